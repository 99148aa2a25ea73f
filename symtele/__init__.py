"Symmetry teleportation: move parameters along a level set of the loss, exactly"
__version__ = "0.1.0"

from .groups import (BatchGL, Chart, GL, LeastSquares, Orthogonal, Permutation, Rotation, Scaling, Slot, Space, Tap, Wiring,
    booth, check_symmetry, ellipse, rosenbrock)
from .teleport import (Ascent, GreatCircle, Grid, MoveData, Random, Sample, Schedule, Stay, Teleported, Teleporter, Whiten, at, every, first, grad_norm, keep,
    landscape, lookahead, loss_of, reset, ridge_whitener,
    second_moment, teleport, transport)
from .wiring import wire
