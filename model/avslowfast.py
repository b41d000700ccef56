"""AVSlowFast: Slow, Fast and Audio pathways with lateral connections (paper section 3, Fig. 1, Table 1).

Table 1 as it is built (R50, 4x16; visual maps are C x T x H for H = W = 256 px, audio maps C x M x F):

    stage    Slow                                Fast                                Audio
    input    3 x 4 x 256                         3 x 32 x 256                        1 x 128 x 80
    conv1    64 x 4 x 128    1x7x7               8 x 32 x 128    5x7x7               32 x 128 x 80    9x1 + 1x9
    pool1    64 x 4 x 64     max 1x3x3           8 x 32 x 64     max 1x3x3           (none)
    res2 x3  256 x 4 x 64    1x1x1, 1x3x3, 1x1x1 32 x 32 x 64    3x1x1, 1x3x3, 1x1x1 128 x 128 x 80   3x1 | 1x3, 1x1
    res3 x4  512 x 4 x 32    1x1x1, 1x3x3, 1x1x1 64 x 32 x 32    3x1x1, 1x3x3, 1x1x1 256 x 64 x 40    3x1 | 1x3, 1x1
    res4 x6  1024 x 4 x 16   3x1x1, 1x3x3, 1x1x1 128 x 32 x 16   3x1x1, 1x3x3, 1x1x1 512 x 32 x 20    1x1, 3x3, 1x1
    res5 x3  2048 x 4 x 8    3x1x1, 1x3x3, 1x1x1 256 x 32 x 8    3x1x1, 1x3x3, 1x1x1 1024 x 16 x 10   1x1, 3x3, 1x1
    head     mean over T and 7x7 windows, over M and F; concatenated (3328); dropout; fc; softmax; mean of windows

    +  two convolutions in parallel, summed;  |  in parallel, concatenated (Table 1 prints a 1x1 before them: see
    `audio_block`). Strides are in the 3x3 or 3-tap convolution of a stage's first block. After res3 and res4 of this
    model (`lateral_stages`, `fusion_stages`): Slow = concat(Slow, F->S) + A->FS, 640 x 4 x 32 and 1280 x 4 x 16.

Where it is: Slow and Fast in visual.py, Audio in audio.py, their blocks in blocks.py, laterals in fusion.py, head in
heads.py, numbers of blocks and widths in config.py, the paper's models by name in variants.py.
Legend: B clips, C channels, T frames of Slow, H W pixels, M audio frames, F mel bins, K classes, R boxes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.modules import GhostBatchNorm, choose_backend, joint_statistics_update
from kernels.sync import any_of_ranks
from model.audio import AudioPathway
from model.config import LATERAL_RATIO, STAGES, ModelConfig
from model.convolutions import Convolution
from model.drop_pathway import AudioAverage, restore_unless, statistics, values_of
from model.frames import in_dtype_of, slow_frames, stem_frames
from model.fusion import FUSIONS, AudioFusion, AudioInput, SyncFeatures, VisualFusion, mean_map
from model.half_weights import WeightCasts, convolutions_of, half_weights
from model.heads import DetectionHead, PooledHead
from model.inputs import check_inputs
from model.modes import apply_freeze
from model.output import ModelOutput
from model.sound import with_stand_ins
from model.synchronization import Synchronization, SyncLoss, active_levels, pair_mask
from model.visual import VisualPathway

ROTATIONS = 4  # 0, 90, 180, 270 degrees (section 6)


@dataclass
class AudioPlan:
    """What is computed of the Audio pathway in one forward: decided on the host from the arguments alone."""

    fuse: bool  # audio enters vision through the laterals
    classify: bool  # audio enters the classifier
    levels: tuple[str, ...]  # synchronization levels that are active
    depth: int  # number of STAGES that the positive audio runs through
    negative_depth: int  # the same for the negative


class AVSlowFast(nn.Module):
    """Every model of the family; `config` says which. Build it with `build_model`."""

    weight_casts: WeightCasts = "auto"  # see half_weights.py

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._groups: dict[Any, list[list[Convolution]]] = {}  # made when first needed: `_weight_groups`
        self.stages = nn.ModuleDict()  # what happens between the pathways after each stage
        if config.has_visual:
            for stage in STAGES:
                fusion = _fusion(stage, config)
                if fusion is not None:
                    self.stages[stage] = fusion
            added: dict[str, int] = {s: LATERAL_RATIO * config.channels("fast", s) for s in config.lateral_stages}
            self.slow = VisualPathway("slow", config, added)
            self.fast = VisualPathway("fast", config, {})
        self.audio = AudioPathway(config) if config.has_audio else None
        averaged = config.has_audio and config.has_visual and config.drop_pathway_mode == "running_average"
        self.audio_average = AudioAverage(config.channels("audio", "res5")) if averaged else None
        outputs = ROTATIONS if config.head == "ssl" else config.num_classes
        self.head = DetectionHead(config, outputs) if config.head == "detection" else PooledHead(config, outputs)
        self.synchronization = _synchronization(config, self.stages) if config.active_sync_levels else None
        choose_backend(self, config.backend)

    def forward(
        self,
        frames: Tensor | None,
        log_mel: Tensor | None = None,
        *,
        negative_log_mel: Tensor | None = None,
        boxes: Tensor | None = None,
        drop_audio: bool = False,
        audio_keep: Tensor | None = None,
        has_audio: Tensor | None = None,
        has_negative: Tensor | None = None,
    ) -> ModelOutput:
        """Classify clips.

        Args:
            frames: (B, 3, alpha_F T, H, W) float, channels_last_3d, normalised; None for an audio-only model.
            log_mel: (B, 1, M, F) float, normalised; None = without audio (the same as a dropped step).
            negative_log_mel: like log_mel, the sound of another clip or time: asks for the loss that sync_loss names.
            boxes: (R, 5) float, batch index and x1, y1, x2, y2 in input pixels, for the detection head alone.
            drop_audio: DropPathway's decision for this step (`drop_pathway.should_drop`), on the host.
            audio_keep: (B,) bool on the device: False drops the audio of one clip (the CUDA-graph form of drop_audio).
                Where all are False, loss, gradients and statistics are those of drop_audio, except that gradients which
                are None there are 0: an optimizer with momentum or weight decay has to pass such parameters over by
                itself.
            has_audio: (B,) bool on the device: False = this clip has no sound. Its audio is dropped and is in no batch
                statistics, whatever its log_mel holds (see `sound.py`); None = all have.
            has_negative: (B,) bool, the same for negative_log_mel.

        Returns:
            logits in training, class scores in evaluation, mean over positions; the synchronization loss with a
            negative; the rotations' logits with the ssl head in training.

        Raises:
            ModelInputError: shapes, types, devices or layouts that do not fit the configuration; box values only on a
                CPU (see `inputs.check_boxes`).
        """
        weight = self.slow.stem.conv.weight if self.audio is None else self.audio.stem.time.weight
        given = {"frames": frames, "log_mel": log_mel, "negative_log_mel": negative_log_mel, "boxes": boxes}
        masks = {"audio_keep": audio_keep, "has_audio": has_audio, "has_negative": has_negative}
        check_inputs(self.config, weight.device, given, masks, drop_audio=drop_audio)
        plan = self._plan(log_mel is not None, negative_log_mel is not None, drop_audio, audio_keep is not None)
        trained = torch.is_grad_enabled() and self.config.freeze != "backbone"
        keep = has_audio if audio_keep is None else audio_keep if has_audio is None else audio_keep & has_audio
        held = self._held(negative_log_mel is not None, plan, keep, has_audio)
        before = [values_of(buffers) for buffers, _ in held]
        heard, other = self._heard(log_mel, negative_log_mel, has_audio, has_negative)
        casts = half_weights(() if torch.compiler.is_compiling() else self._weight_groups(plan), self.weight_casts)
        with torch.set_grad_enabled(trained), joint_statistics_update(), casts:
            maps, audio, features = self._features(frames, heard, other, plan, keep)
        for (buffers, used), values_before in zip(held, before, strict=True):
            restore_unless(used, buffers, values_before)
        values = self.head(maps, self._classifier_audio(audio, plan, keep, has_audio, maps), boxes)
        sync = SyncLoss()
        if features and log_mel is not None and negative_log_mel is not None and self.synchronization is not None:
            pairs = self._pairs(tuple(features), pair_mask(log_mel, negative_log_mel), audio_keep)
            sync = self.synchronization(features, pairs)
        training = self.head.training
        rotations = values if training and self.config.head == "ssl" else None
        return ModelOutput(values, "logits" if training else "scores", rotations, sync.loss, sync.accuracy, sync.pairs)

    # One forward ------------------------------------------------------------------------------------------------

    def _plan(self, has_audio: bool, has_negative: bool, drop_audio: bool, masked: bool) -> AudioPlan:
        """Decide what to compute; see `AudioPlan`."""
        config = self.config
        if self.audio is None or not has_audio:
            return AudioPlan(False, False, (), 0, 0)
        keep = not drop_audio
        classify = keep or config.drop_pathway_mode == "laterals_only"
        levels: tuple[str, ...] = ()
        if has_negative and self.synchronization is not None:
            levels = active_levels(config, fused=keep and not masked)
        reach = max([0, *[_stage_number(level) for level in levels]])  # no default=: torch 2.11 compiles none
        return AudioPlan(keep, classify, levels, len(STAGES) if classify else reach, reach)

    def _held(
        self, has_negative: bool, plan: AudioPlan, keep: Tensor | None, has_audio: Tensor | None
    ) -> list[tuple[list[Tensor], Tensor]]:
        """Running statistics that clips may turn out not to have trained, each with () bool, whether they have.

        Norms that a step with audio runs and a dropped one does not need a kept clip, the others of the audio a clip
        with sound.
        """
        if keep is None or not self._learns_statistics:
            return []
        norms = self._norms(plan)
        always = {id(norm) for norm in self._norms(self._plan(True, has_negative, True, False))} if plan.fuse else set()
        found = [(statistics(n for n in norms if plan.fuse and id(n) not in always), keep)]
        if has_audio is not None:
            found.append((statistics(n for n in norms if not plan.fuse or id(n) in always), has_audio))
        return [(buffers, any_of_ranks(clips, self._norm_group)) for buffers, clips in found if buffers]

    def _heard(
        self, log_mel: Tensor | None, negative: Tensor | None, has_audio: Tensor | None, has_negative: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The spectrograms that run: where batch statistics are made, none of a clip without sound."""
        if log_mel is None or has_audio is None or not self._learns_statistics:  # then no row has to do with another
            return log_mel, negative
        return with_stand_ins(
            log_mel, negative, has_audio, has_negative, self.config.clips_per_bn_group, self._norm_group
        )

    @property
    def _norm_group(self) -> Any:
        """Process group whose ranks form the audio's BN groups together; None: every rank has its own."""
        return None if self.audio is None else getattr(self.audio.stem.norm, "process_group", None)

    @property
    def _learns_statistics(self) -> bool:
        """Whether the audio's norms use and learn batch statistics now."""
        norm = None if self.audio is None else self.audio.stem.norm
        return isinstance(norm, GhostBatchNorm) and norm.uses_batch_statistics

    def _norms(self, plan: AudioPlan) -> list[GhostBatchNorm]:
        """Norms that this plan runs and another might not: all but those of Slow, Fast and the model's F->S."""
        parts: list[nn.Module] = []
        for number, stage in enumerate(STAGES, start=1):
            if number <= plan.depth and self.audio is not None:
                parts.append(self.audio.stem if stage == "pool1" else self.audio.stages[stage])
            fused = plan.fuse and stage in self.config.audio_fusion_stages
            for name, part in self.stages[stage].named_children() if stage in self.stages else ():
                always = name == "fast_to_slow" and stage in self.config.lateral_stages
                if not always and (fused or (stage in plan.levels and name != "out")):  # `out`: AV Nonlocal's answer
                    parts.append(part)
        return [module for part in parts for module in part.modules() if isinstance(module, GhostBatchNorm)]

    def _weight_groups(self, plan: AudioPlan) -> list[list[Convolution]]:
        """Convolutions that this plan runs, by stage, vision apart from audio."""
        key = plan.fuse, plan.levels, plan.depth, plan.negative_depth
        if key not in self._groups:
            groups = []
            for number, stage in enumerate(STAGES, start=1):
                visual: list[nn.Module] = []
                heard: list[nn.Module] = []
                for pathway in (self.slow, self.fast) if self.config.has_visual else ():
                    visual.append(pathway.stem if stage == "pool1" else pathway.stages[stage])
                if self.audio is not None and number <= max(plan.depth, plan.negative_depth):
                    heard.append(self.audio.stem if stage == "pool1" else self.audio.stages[stage])
                fused = plan.fuse and stage in self.config.audio_fusion_stages
                for name, part in self.stages[stage].named_children() if stage in self.stages else ():
                    if name == "fast_to_slow":
                        visual.append(part)
                    elif fused or stage in plan.levels:
                        heard.append(part)
                groups += [convolutions_of(visual), convolutions_of(heard)]
            self._groups[key] = groups
        return self._groups[key]

    def _features(
        self,
        frames: Tensor | None,
        log_mel: Tensor | None,
        negative: Tensor | None,
        plan: AudioPlan,
        keep: Tensor | None,
    ) -> tuple[list[Tensor], Tensor | None, dict[str, SyncFeatures]]:
        """Run the pathways; visual maps of res5 (Slow, Fast), audio map of res5, and synchronization features."""
        slow = fast = None
        features: dict[str, SyncFeatures] = {}
        if frames is not None:
            frames = stem_frames(frames, self.fast.stem.conv)
            slow, fast = self.slow(slow_frames(frames, self.config)), self.fast(frames)
        for number, stage in enumerate(STAGES, start=1):
            log_mel = self._audio_stage(log_mel, stage, number <= plan.depth)
            negative = self._audio_stage(negative, stage, number <= plan.negative_depth)
            if slow is None or fast is None:
                continue
            if stage != "pool1":
                slow, fast = self.slow.stages[stage](slow), self.fast.stages[stage](fast)
            slow, fast, found = self._fuse(stage, slow, fast, log_mel, negative, plan, keep)
            if found is not None:
                features[stage] = found
        if "pool5" in plan.levels and slow is not None and fast is not None and log_mel is not None:
            assert negative is not None
            visual = torch.cat([mean_map(slow), mean_map(fast)], 1)
            features["pool5"] = SyncFeatures(visual, mean_map(log_mel), mean_map(negative))
        return [x for x in (slow, fast) if x is not None], log_mel, features

    def _audio_stage(self, x: Tensor | None, stage: str, wanted: bool) -> Tensor | None:
        if x is None or not wanted or self.audio is None:
            return None
        if stage == "pool1":
            x = in_dtype_of(x, self.audio.stem.time.weight)
            # One channel: (B, M, F, 1) seen as (B, 1, M, F) has the strides of channels_last; only a transposed or
            # expanded log-mel is copied.
            return self.audio(x.squeeze(1).contiguous().unsqueeze(-1).permute(0, 3, 1, 2))
        out: Tensor = self.audio.stages[stage](x)
        return out

    def _fuse(
        self,
        stage: str,
        slow: Tensor,
        fast: Tensor,
        audio: Tensor | None,
        negative: Tensor | None,
        plan: AudioPlan,
        keep: Tensor | None,
    ) -> tuple[Tensor, Tensor, SyncFeatures | None]:
        """Laterals after one stage; a stage that has them for synchronization only leaves vision as it was."""
        lateral, level = stage in self.config.lateral_stages, stage in plan.levels
        if not (lateral or level):
            return slow, fast, None
        fused = plan.fuse and stage in self.config.audio_fusion_stages
        given = AudioInput(audio if fused or level else None, negative if level else None, fused, keep)
        new_slow, new_fast, found = self.stages[stage](slow, fast, given)
        return (new_slow, new_fast, found) if lateral else (slow, fast, found)

    def _classifier_audio(
        self, audio: Tensor | None, plan: AudioPlan, keep: Tensor | None, sound: Tensor | None, maps: list[Tensor]
    ) -> Tensor | None:
        """Pooled audio (B, C_a) for the classifier; None where it is dropped (the zeros of section 3.5)."""
        pooled = None
        if audio is not None and plan.classify:
            pooled = mean_map(audio, audio.dtype)
        if self.audio_average is not None:
            average = self.audio_average((maps[0].shape[0], self.audio_average.average.shape[0]), maps[0].dtype)
            if pooled is None:
                return average
            chosen = pooled if keep is None else torch.where(keep[:, None], pooled, average)
            self.audio_average.update(pooled, keep)
            return chosen
        chosen_by = keep if self.config.drop_pathway_mode == "zeros" else sound
        return pooled if pooled is None or chosen_by is None else torch.where(chosen_by[:, None], pooled, 0)

    def _pairs(self, levels: tuple[str, ...], pairs: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
        """Pairs (B,) that count at each level; with a device-side drop, later levels use dropped clips only."""
        if keep is None:
            return dict.fromkeys(levels, pairs)
        safe = active_levels(self.config, fused=True)
        return {level: pairs if level in safe else pairs & ~keep for level in levels}


def build_model(config: ModelConfig) -> AVSlowFast:
    """Build a model with fresh weights in channels_last_3d (He initialisation; facts of Table 1).

    Args:
        config: the model; `config.freeze` is applied, `config.backend` is that of its norms and lateral fusions.
    Returns:
        the model in train mode, float32, on the default device.
    """
    model = AVSlowFast(config)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    set_layout(model)
    apply_freeze(model, config.freeze)
    return model


def set_layout(model: nn.Module) -> None:
    """Put every convolution's weight into channels_last(_3d), in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def _fusion(stage: str, config: ModelConfig) -> VisualFusion | AudioFusion | None:
    if stage in config.audio_fusion_stages or stage in config.active_sync_levels:
        return FUSIONS[config.fusion](stage, config)
    return VisualFusion(stage, config) if stage in config.lateral_stages else None


def _synchronization(config: ModelConfig, stages: nn.ModuleDict) -> Synchronization:
    channels: dict[str, tuple[int, int]] = {}
    for level in config.active_sync_levels:
        if level == "pool5":
            visual = sum(config.channels(p, "res5") for p in ("slow", "fast"))
            channels[level] = (visual, config.channels("audio", "res5"))
        else:
            fusion: Any = stages[level]
            assert isinstance(fusion, AudioFusion)
            channels[level] = (fusion.reference_channels, fusion.signal_channels)
    return Synchronization(config, channels)


def _stage_number(level: str) -> int:
    return len(STAGES) if level == "pool5" else STAGES.index(level) + 1
