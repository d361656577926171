"""InfiniPot-V (arXiv 2506.15745): the latest frames, patches that have changed since, and values of large norm."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from acckv.errors import InputError
from acckv.method.modality import Modality, ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation
from acckv.policies.base import Policy
from acckv.policies.registry import register_policy


@register_policy("infinipot_v")
@dataclass(frozen=True)
class InfiniPotV(Policy):
    """Shares of the budget for the latest entries, for patches unlike the latest frames, and for large value norms.

    Temporal redundancy is the mean cosine similarity of a key to those of the recent frames at the same patch; the
    least redundant come first. Three rankings of a head's entries, merged: what a budget keeps is the first of each, in
    their shares.

    Deviations from arXiv 2506.15745 and its code: a prompt is compressed once, not block by block. The code keeps 24 of
    32 frames each time, the last 8 whole: hence a third of the budget for the latest, which is a guess for other ratios
    (`recent_share: 0` drops it), and the last quarter of all frames as recent ones. The grid is not known: a frame is a
    run of video entries, in a stream what is left of it. Where all video is one run, and in audio, for which the paper
    defines nothing, each entry is a frame of one patch. Value norms are not pooled, as in the code's scripts; the paper
    pools them over the grid. The modalities keep equal shares of their entries. With `head_budgets: joint`, a head
    keeps as many entries as it has among the first of all heads of the layer; which ones is still its own ranking.
    """

    tar_share: float = field(
        default=0.5,
        metadata={"help": "Share of the budget for the latest and the least redundant; 0 to 1.", "low": 0, "high": 1},
    )
    recent_share: float = field(
        default=0.33, metadata={"help": "Share of the budget for the latest, out of `tar_share`.", "low": 0, "high": 1}
    )
    recent_frames: float = field(
        default=0.25,
        metadata={"help": "Share of the frames, the last, that keys are compared with; 0 to 1.", "low": 0, "high": 1},
    )
    frame_size: int | None = field(
        default=None, metadata={"help": "Entries of a frame of video; none: a frame is a run of them.", "low": 1}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent_share > self.tar_share:
            raise InputError(f"{self.recent_share:g} is above tar_share, {self.tar_share:g}", field="recent_share")

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        directions = observation.keys * observation.key_scale[..., None]
        unlike = self.shared(-_similarity_to_recent(directions, *self._frames(labels)))
        norms = self.shared(observation.values.float().norm(dim=-1))
        latest = torch.arange(norms.shape[-1], device=norms.device).expand_as(norms)
        shares = (1 - self.tar_share, self.tar_share - self.recent_share, self.recent_share)
        lists = [(one.float(), share) for one, share in zip((norms, unlike, latest), shares, strict=True) if share > 0]
        own = _best_rank(lists, labels.by_modality)
        flat = [(one.flatten(1)[:, None], share) for one, share in lists]
        among_all = _best_rank(flat, labels.by_modality.repeat(1, 1, norms.shape[1])).view_as(norms)
        # In the order of a head's own ranks, the values of its ranks among all heads.
        ranks = torch.empty_like(own).scatter_(-1, own.argsort(dim=-1, stable=True), among_all.sort(dim=-1).values)
        return LayerScore(-ranks, None)

    def _frames(self, labels: ModalityMap) -> tuple[Tensor, Tensor]:
        """The patch of each entry in its frame, int64 ``[B, N]``, N in audio; and bool, whether its frame is recent."""
        video, offset = labels.labels == Modality.VIDEO, labels.segment_offset
        entries = offset.shape[1]
        runs = ((offset == 0) & video).sum(-1, keepdim=True)
        size = torch.where(runs > 1, entries, 1) if self.frame_size is None else self.frame_size
        patch = offset % torch.where(video, size, 1)
        number = ((patch == 0)[:, None] & labels.by_modality).cumsum(-1)
        frames = number[..., -1:]
        recent = number > frames - (self.recent_frames * frames).long().clamp_min(1)
        return torch.where(video, patch, entries), (recent & labels.by_modality).any(1)


def _similarity_to_recent(directions: Tensor, patch: Tensor, recent: Tensor) -> Tensor:
    """Mean cosine similarity ``[B, K, N]`` of each key to the recent ones of its patch; 0 where there are none."""
    batch, heads, entries, size = directions.shape
    index = patch[:, None, :, None].expand_as(directions)
    sums = directions.new_zeros(batch, heads, entries + 1, size)
    sums.scatter_add_(2, index, directions * recent[:, None, :, None])
    counts = directions.new_zeros(batch, entries + 1).scatter_add_(1, patch, recent.to(directions.dtype))
    return (directions * sums.gather(2, index)).sum(-1) / counts.gather(1, patch).clamp_min(1)[:, None]


def _best_rank(lists: list[tuple[Tensor, float]], members: Tensor) -> Tensor:
    """The least of an entry's ranks in some lists of scores ``[B, K, N]``, each over the share of its list.

    A rank is the share of the head's entries of the same modality, bool ``[B, 2, N]``, that do not come behind. Up to
    `c` there are the first ``c * share`` of each list, so no more than `c` of all entries.
    """
    members = members[:, None]
    count, best = members.sum(-1, keepdim=True), []
    for score, share in lists:
        order = score[:, :, None].masked_fill(~members, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        rank = (order.argsort(dim=-1) + 1) / (count * share)
        best.append(rank.masked_fill(~members, len(lists) + 1).amin(2))  # behind every member
    return torch.stack(best).amin(0)
