"""`python -m octoai` is the `octoai` command."""

from octoai.cli import main

raise SystemExit(main())
