"""`python -m pellucid`: the command, where its script is not on the path."""

from pellucid.cli import main

if __name__ == "__main__":  # a worker process imports this module too
    main()
