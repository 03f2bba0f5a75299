"""Train, measure and use sentence embeddings; a name below is imported when it is first used."""

__version__ = "0.1.0"

from importlib import import_module as _import_module

_MODULE_OF = {
    "SentenceEncoder": "model",
    "train": "trainer",
    "TrainConfig": "config",
    "Mixture": "mixture",
    "read_examples": "data",
    "load_source": "data",
    "read_sts": "data",
    "read_retrieval": "data",
    "evaluate_sts": "evaluation",
    "evaluate_retrieval": "evaluation",
    "semantic_search": "search",
    "cluster": "search",
    "paraphrase_mining": "search",
    "mine_hard_negatives": "mining",
}
__all__ = [*_MODULE_OF]


def __getattr__(name):
    "Import a public name from its module, so that `import contrastive_st` itself costs nothing."
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__():
    return sorted({*globals(), *__all__})
