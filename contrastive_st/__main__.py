"`python -m contrastive_st` is the command `contrastive-st`; the one module that no notebook holds, since it is three lines."
from contrastive_st.cli import main

if __name__ == "__main__":
    main()
