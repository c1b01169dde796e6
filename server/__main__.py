"""The command `evalpool`, also `python -m server`. Imports nothing by itself: spawned children import this again."""


def main() -> None:
    """Run the command line."""
    from server.cli import app

    app()


if __name__ == "__main__":
    main()
