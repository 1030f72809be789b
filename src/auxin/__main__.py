"""`python -m auxin` is the command line."""

from auxin.cli import main

if __name__ == "__main__":
    main()
