"""``--recipe``: a bundle's model and training settings as the defaults of a command's options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs._common import Parser
from pipeline.storage.errors import SerError
from pipeline.training.config import FitConfig


def add_recipe_option(parser: Parser) -> None:
    """``--recipe``, which ``with_recipe`` reads before all others."""
    parser.add_argument(
        "--recipe", type=Path, metavar="BUNDLE", help="take model and training settings from a bundle, where not given"
    )


def with_recipe(parser: Parser, argv: Sequence[str]) -> Parser:
    """The parser, with the settings that ``--recipe`` names as its defaults.

    Raises:
        SerError: no such bundle, or one that does not tell how it was trained.
    """
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
            raise SerError(f"{bundle_path} does not tell how it was trained; give the settings as options")
        found = _defaults(settings, bundle.labels)
        parser.set_defaults(**found, model=bundle.model_name)
        if given.model in (None, bundle.model_name):  # another network has other options, and other defaults
            parser.set_defaults(**bundle.model_options)
    return parser


def _defaults(settings: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """A bundle's training settings as option values; classes by name, for their numbers are those of its labels."""
    found = {name: settings[name] for name in FitConfig.recipe() if name in settings}  # older bundles have fewer
    weights = settings["class_weights"]
    return found | {
        "augment": ",".join(settings["augment"]),
        "oversample_boost": {labels[int(number)]: factor for number, factor in settings["oversample_boost"].items()},
        "class_weights": "none" if weights is None else dict(zip(labels, weights, strict=True)),
    }
