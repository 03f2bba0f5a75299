"Run the command line: `python -m contrastive_st` is `contrastive-st`."
from contrastive_st.cli import main

if __name__ == "__main__":
    main()
