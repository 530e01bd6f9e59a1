"""``python -m yunque``: the command line, for launchers that start modules (``accelerate launch -m yunque ...``)."""

from yunque.cli import main

if __name__ == "__main__":
    main()
