"""`python -m agent` is `rbd-siphon`."""

from agent.cli import main

if __name__ == "__main__":
    main()
