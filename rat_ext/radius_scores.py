"""The scores by radius, under the name that they had first: see `rat_ext.scores`."""

from .scores.radius import RRBS, RadiusScore, RRFast

__all__ = ["RRBS", "RRFast", "RadiusScore"]
