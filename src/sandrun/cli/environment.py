"""Sets of Python packages that jobs ask for by name: `"environment": "data"` in a manifest.

Packages are downloaded and built as an unprivileged user; what comes out is read-only in every job. A server that runs
takes a new or changed set up by itself, and offers one that was removed until it ends.
"""

from __future__ import annotations

import argparse

from sandrun.cli.progress import working
from sandrun.cli.settings import add_flags, load_config
from sandrun.cli.terminal import one_line, print_json
from sandrun.config import Config

EXAMPLES = """examples:
  sudo sandrun environment build data                      # or scientific, or ml: ready definitions
  sudo sandrun environment build own numpy 'polars>=1' --preload numpy numpy.random polars
  sudo sandrun environment build pinned --requirements requirements.txt --require-hashes
  sandrun environment list
  sudo sandrun environment remove data"""


parse = argparse.ArgumentParser.parse_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="build|list|remove", required=True)
    build = actions.add_parser("build", help="build one, or build it anew", allow_abbrev=False)
    build.add_argument("name", metavar="NAME")
    build.add_argument("packages", metavar="PACKAGE", nargs="*", help="as pip takes them: numpy, 'pandas>=2,<3'")
    build.add_argument("--requirements", metavar="FILE", help="a requirements file")
    build.add_argument("--require-hashes", action="store_true", help="refuse what has no hash in the requirements file")
    build.add_argument(
        "--preload", metavar="MODULE", nargs="*", help="modules that jobs find loaded; not given: a ready definition's"
    )
    listing = actions.add_parser("list", help="those that are there", allow_abbrev=False)
    remove = actions.add_parser("remove", help="remove one", allow_abbrev=False)
    remove.add_argument("name", metavar="NAME")
    for action in (build, listing, remove):
        if action is not remove:
            action.add_argument("--json", action="store_true", help="name, packages, digest, python, created, preload")
        add_flags(action, "isolation", only="state_dir")


def run(args: argparse.Namespace) -> int:
    return {"build": _build, "list": _list, "remove": _remove}[args.action](args, load_config(args))


def _build(args: argparse.Namespace, config: Config) -> int:
    from sandrun import environments

    with working(f"building {one_line(args.name)}"):
        built = environments.build(
            args.name,
            args.packages,
            state_dir=config.state_dir,
            requirements=args.requirements,
            require_hashes=args.require_hashes,
            preload=args.preload,
        )
    if args.json:
        print_json(_fields(built))
    else:
        count = f"{len(built.packages)} package{'s' if len(built.packages) != 1 else ''}"
        print(f"{one_line(built.name)}: {count}, digest {built.digest[:16]}, {one_line(built.path)}")
    return 0


def _list(args: argparse.Namespace, config: Config) -> int:
    from sandrun import environments

    found = environments.list_(config.state_dir)
    if args.json:
        print_json([_fields(environment) for environment in found])
        return 0
    for environment in found:
        packages = " ".join(f"{name}=={version}" for name, version in environment.packages.items())
        print(f"{one_line(environment.name)}  {environment.digest[:16]}  {environment.created}  {one_line(packages)}")
    return 0


def _remove(args: argparse.Namespace, config: Config) -> int:
    from sandrun import environments

    environments.remove(args.name, config.state_dir)
    return 0


def _fields(environment: object) -> dict[str, object]:
    names = ("name", "packages", "digest", "python", "created", "preload", "path")
    return {name: getattr(environment, name) for name in names}
