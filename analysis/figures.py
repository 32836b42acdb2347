"""Figures: one function each, which returns its axes; one style (:mod:`analysis.figures_style`).

Every function draws on a new figure, or on ``ax=`` where it has a single panel. :func:`png`,
:func:`svg` and :func:`save` take what they return. No pyplot, so nothing global is touched.
"""

from analysis.figures_curves import abstention, anytime_curve, forgetting_bars, routing_margins
from analysis.figures_matrices import accuracy_matrices, router_confusion, similarity_map
from analysis.figures_style import figure_of, png, save, svg
from analysis.figures_sweeps import (
    accuracy_against_parameters,
    critical_difference_diagram,
    stability_plasticity,
    sweep_overview,
)

__all__ = [
    "abstention",
    "accuracy_against_parameters",
    "accuracy_matrices",
    "anytime_curve",
    "critical_difference_diagram",
    "figure_of",
    "forgetting_bars",
    "png",
    "router_confusion",
    "routing_margins",
    "save",
    "similarity_map",
    "stability_plasticity",
    "svg",
    "sweep_overview",
]
