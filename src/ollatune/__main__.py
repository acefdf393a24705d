"""`python -m ollatune`."""

from ollatune.cli import entry

if __name__ == "__main__":
    entry()
