"""``python -m packager``: the command line."""

from __future__ import annotations

from packager.cli.main import main

if __name__ == "__main__":
    main()
