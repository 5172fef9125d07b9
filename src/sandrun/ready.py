"""Environments that need no more than their name: what is in them, and what their zygotes have loaded.

Modules are public ones that all versions have. They are those that jobs import, and those that a first use would load.
"""

from __future__ import annotations

from typing import NamedTuple


class Definition(NamedTuple):
    """`packages` as pip takes them, `preload` as `import` does."""

    packages: tuple[str, ...]
    preload: tuple[str, ...]


_NUMPY = "numpy numpy.random numpy.linalg numpy.fft numpy.polynomial"
_SCIPY = """
    scipy.cluster scipy.constants scipy.fft scipy.integrate scipy.interpolate scipy.io scipy.linalg scipy.ndimage
    scipy.optimize scipy.signal scipy.sparse scipy.spatial scipy.special scipy.stats
    """
_PLOTTING = "matplotlib matplotlib.pyplot matplotlib.backends.backend_agg matplotlib.backends.backend_svg"
_LEARNING = """
    sklearn sklearn.cluster sklearn.compose sklearn.datasets sklearn.decomposition sklearn.ensemble
    sklearn.feature_extraction.text sklearn.feature_selection sklearn.impute sklearn.linear_model sklearn.metrics
    sklearn.model_selection sklearn.naive_bayes sklearn.neighbors sklearn.neural_network sklearn.pipeline
    sklearn.preprocessing sklearn.svm sklearn.tree
    """

DEFINITIONS = {
    "data": Definition(("numpy", "pandas", "matplotlib"), (*_NUMPY.split(), "pandas", *_PLOTTING.split())),
    "scientific": Definition(("numpy", "scipy", "sympy"), (*_NUMPY.split(), *_SCIPY.split(), "sympy")),
    "ml": Definition(("scikit-learn",), (*_NUMPY.split(), *_LEARNING.split())),
}
