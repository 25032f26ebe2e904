"""For when one machine is not enough: radii of a Ray Dataset, and the service on Ray Serve.

What Ray is for, starting processes on many machines and starting those again that die, is left to
it. `RadiusMapper` is what runs in each actor of `ray.data`, `replica` in each replica of Serve.
"""

from .mapper import RadiusMapper
from .serving import deployment

__all__ = ["RadiusMapper", "deployment"]
