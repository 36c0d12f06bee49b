"""``--recipe``: a bundle's model and training settings as the defaults of a command's options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs._common import Parser
from pipeline.storage.errors import SerError
from pipeline.training.config import FitConfig


def add_recipe_option(parser: Parser) -> None:
    """Add ``--recipe``, which ``with_recipe`` reads before the other options."""
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="BUNDLE",
        help="use the model and training settings of this bundle as defaults of the options below",
    )


def with_recipe(parser: Parser, argv: Sequence[str]) -> Parser:
    """The parser, with the settings of the ``--recipe`` bundle as its defaults; refuses a bundle that has none."""
    first = Parser(prog=parser.prog, add_help=False)
    add_recipe_option(first)
    first.add_argument("--model")
    given = first.parse_known_args(argv)[0]  # type: ignore[no-untyped-call]
    bundle_path = given.recipe
    if bundle_path is not None:
        from pipeline.models.bundle import load_bundle

        bundle = load_bundle(bundle_path)
        settings = bundle.metrics.get("training", {}).get("settings")
        if settings is None:
            raise SerError(f"{bundle_path} has no record of its training settings; give the settings as options")
        found = _defaults(settings, bundle.labels)
        parser.set_defaults(**found, model=bundle.model_name)
        if given.model in (None, bundle.model_name):  # another network has other options
            parser.set_defaults(**bundle.model_options)
    return parser


def parse_with_recipe(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line with ``with_recipe``."""
    return with_recipe(parser, argv).parse_args(argv)


def _defaults(settings: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """A bundle's training settings as option values; class indices become names, as other data may order them anew."""
    found = {name: settings[name] for name in FitConfig.recipe() if name in settings}  # older bundles have fewer
    weights = settings["class_weights"]
    return found | {
        "augment": ",".join(settings["augment"]),
        "oversample_boost": {labels[int(number)]: factor for number, factor in settings["oversample_boost"].items()},
        "class_weights": "none" if weights is None else dict(zip(labels, weights, strict=True)),
    }
