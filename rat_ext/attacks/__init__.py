"""Other ways to the nearest change of the prediction than the FGSM ray: the ``attack`` option.

    rat_ext.robust_radius(model, x, attack="pgd", steps=20)
    rat_ext.robust_radius(model, x, attack=["pgd_l2", "deepfool_l2"], full=True).won

Every attack has a norm, L-inf or, if its name ends in ``_l2``, L2, and gives an upper bound of the
true distance in it:

- ``fgsm``, ``fgsm_l2``: the ray ``clip(x + e * d)`` with d the gradient's sign, or the gradient
  scaled to L2 norm 1. Where the bounds clip the step, the input has moved by less than e: the
  radius e is never smaller than the distance to the point that was found.
- ``pgd``, ``pgd_l2``: at each radius e that the search probes, projected gradient descent in the
  ball of radius e around x (Madry et al., ICLR 2018). The first e is the radius of FGSM, and the
  result is never larger than that.
- ``deepfool`` (Moosavi-Dezfooli et al., CVPR 2016) and ``fmn`` (Pintor et al., NeurIPS 2021) of
  foolbox, ``fab`` (Croce and Hein, ICML 2020) of torchattacks, each also with ``_l2``, and any
  function ``(model, x, y) -> x_adv``. The library says where to look, the search how far: what is
  searched is the ray from x through x_adv, so that overshooting costs nothing.
- ``best``, ``best_l2``, or a sequence of attacks of one norm: for each sample the smallest radius.

All searches follow the one bracket rule (csrc/rule/search.h), and no named attack starts at random.
"""

from ..search.attack import names
from . import borrowed, pgd, rays

__all__ = ["borrowed", "names", "pgd", "rays"]
