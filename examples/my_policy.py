"""A policy of one's own: attention times the size of the value that it would fetch (VATP, arXiv 2406.12335).

python evaluate.py --plugins examples/my_policy.py --policies snapkv,value_aware --data.clips 4
python evaluate.py ask clip.mp4 "What shape was the red one?" --plugins examples/my_policy.py --policy value_aware
"""

from __future__ import annotations

from dataclasses import dataclass, field

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation, heavy_hitter_score
from acckv.policies import Policy, register_policy


@register_policy("value_aware")
@dataclass(frozen=True)
class ValueAware(Policy):
    """The entries of which attention and the L1 norm of the value are large together.

    Options are fields: `ValueAware(window_size=64)` in Python, and on the command line
    `--policies '[{class_path: value_aware, init_args: {window_size: 64}}]'`.
    """

    window_size: int = field(default=32, metadata={"help": "Observed queries at the end of the prompt.", "low": 1})
    power: float = field(default=1.0, metadata={"help": "Of the norm; 0 leaves it out.", "low": 0.0, "high": 4.0})

    queries = "window"

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        """The score ``[batch, kv_heads, tokens]`` of every entry; higher is kept first."""
        attention = heavy_hitter_score(observation)
        size = observation.values.float().norm(p=1, dim=-1)
        return LayerScore(self.shared(attention * size**self.power), None)
