"""The root of every error that a user's input can cause.

SerError
 +- labels.LabelError           a label that no class has
 +- features.FeatureError       audio or features that do not fit a FeatureConfig
 +- audio.AudioError            one recording that cannot be read; has a stable ``code``
 +- corpora.ManifestError       a folder, CSV or table that is no manifest
 +- arrays.ShardError           a feature folder that is incomplete or of another configuration
 +- checkpoint.BundleError      a model bundle that is missing, damaged or unknown
"""

from __future__ import annotations


class SerError(Exception):
    """A mistake in what was given: one line that says what was got, what was expected, and the remedy.

    Jobs print it without a traceback and exit with 2.
    """


class SerWarning(UserWarning):
    """Something that the user should know of what was done: one line, with the remedy. Jobs print it as such."""
