"""One training run: a small Llama from a random start, by one of the ways to train it."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.optimizers import AdaRankGrad, GaLoreAdamW, PruneByMagnitude, ReLora, model_param_groups
from rankwise.optimizers.jagged_schedule import cosine_factor, jagged
from reproduction.beyond.pretraining.corpus import corpus, random_rows, spread_rows

Settings = dict[str, Any]
Groups = list[dict[str, Any]]


class Run(NamedTuple):
    """Everything that a run depends on besides the study's settings.

    Attributes:
        rate: of the hidden matrices, or of what stands in for them.
        other_rate: of embeddings, output head and norms, which AdamW trains in full whatever the method.
        warm_rate: of the hidden matrices while a warm start lasts.
        part: "tuning" or "held_out": what its losses are taken on.
    """

    corpus: str
    method: str
    rank: int
    rate: float
    other_rate: float
    seed: int
    tokens: int
    part: str
    warm_rate: float = 0.0


class Trained(NamedTuple):
    """``looks`` are (tokens seen, loss on the run's part) of a run, the last one at its end."""

    model: nn.Module
    looks: list[tuple[int, float]]
    state_bytes: int
    trainable: int


def small_llama(settings: Settings, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=settings["width"], intermediate_size=settings["inner_width"],
        num_hidden_layers=settings["layers"], num_attention_heads=settings["heads"],
        max_position_embeddings=settings["length"], tie_word_embeddings=False,
        attn_implementation="eager",  # the faster one on CPUs, at such lengths
    ))  # fmt: skip


def measured_run(run: Run, settings: Settings) -> dict[str, Any]:
    """What a run leaves in the record."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    done = train(run, settings)
    return {
        "tokens": [tokens for tokens, _ in done.looks],
        "losses": [loss for _, loss in done.looks],
        "state_bytes": done.state_bytes,
        "trainable": done.trainable,
        "seconds": time.perf_counter() - started,
    }


def train(run: Run, settings: Settings) -> Trained:
    """Every method sees the same batches in the same order, under one schedule: up over a tenth, then a cosine down to a tenth."""
    text = corpus(run.corpus)
    per_step = settings["rows"] * settings["length"]
    steps = run.tokens // per_step
    held_out = spread_rows(getattr(text, run.part), settings["looked_at_rows"], settings["length"])
    generator = torch.Generator().manual_seed(run.seed)
    trainer = _METHODS[run.method](small_llama(settings, run.seed), run, settings, steps)
    look_after = {round(steps * look / settings["looks"]) for look in range(1, settings["looks"] + 1)}
    looks = [(0, mean_loss(trainer.model, held_out, settings))]
    for step in range(steps):
        rows = random_rows(text.train, settings["rows"], settings["length"], generator)
        trainer.before(step)
        for group in trainer.optimizer.param_groups:
            group["lr"] = group["highest_lr"] * trainer.factor(step)
        _loss(trainer.model, rows).backward()
        nn.utils.clip_grad_norm_(trainer.model.parameters(), settings["max_norm"])
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.look_at_state()
        if step + 1 in look_after:
            looks.append(((step + 1) * per_step, mean_loss(trainer.model, held_out, settings)))
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return Trained(trainer.model, looks, trainer.state_bytes, trainable)


def mean_loss(model: nn.Module, rows: Tensor, settings: Settings) -> float:
    """Nats a token."""
    with torch.no_grad():
        parts = rows.split(settings["rows"])
        return sum(float(_loss(model, part)) * len(part) for part in parts) / len(rows)


def _loss(model: nn.Module, rows: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        loss: Tensor = model(input_ids=rows, labels=rows).loss
    return loss


# -- the ways to train -------------------------------------------------------------------------------------------


class _FullSize:
    """An optimizer of every weight."""

    def __init__(self, model: LlamaForCausalLM, run: Run, settings: Settings, steps: int):
        self.model: nn.Module = model
        self.optimizer = self.make_optimizer(_groups(model, run), run, settings)
        self.factor: Callable[[int], float] = _cosine(steps)
        self.state_bytes = 0

    def make_optimizer(self, groups: Groups, run: Run, settings: Settings) -> torch.optim.Optimizer:
        """AdamW, which takes no notice of a group's rank."""
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def before(self, step: int) -> None:
        """What a method does between two steps."""

    def look_at_state(self) -> None:
        """The most that the optimizer has kept at any time."""
        self.state_bytes = max(self.state_bytes, sum(tensor.nbytes for tensor in _tensors(self.optimizer)))


class _Galore(_FullSize):
    def make_optimizer(self, groups: Groups, run: Run, settings: Settings) -> torch.optim.Optimizer:
        return GaLoreAdamW(groups, refresh_every=settings["refresh_every"])


class _AdaRankGrad(_FullSize):
    def make_optimizer(self, groups: Groups, run: Run, settings: Settings) -> torch.optim.Optimizer:
        return AdaRankGrad(groups, refresh_every=settings["refresh_every"], energy=settings["energy"])


class _Lora(_FullSize):
    """A LoRA on every hidden matrix; embeddings, head and norms are trained in full, as ReLoRA's authors do."""

    def __init__(self, model: LlamaForCausalLM, run: Run, settings: Settings, steps: int):
        hidden, *others = _groups(model, run)
        layers = [name.removesuffix(".weight") for name in hidden["param_names"]]
        adapted: nn.Module = get_peft_model(model, LoraConfig(r=run.rank, lora_alpha=run.rank, target_modules=layers))
        factors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        for parameter in (parameter for group in others for parameter in group["params"]):
            parameter.requires_grad_(True)
        groups = [{"params": factors, "highest_lr": run.rate}]
        groups += [{"params": group["params"], "highest_lr": run.other_rate} for group in others]
        self.model, self.factor, self.state_bytes = adapted, _cosine(steps), 0
        self.optimizer = self.make_optimizer(groups, run, settings)


class _Relora(_Lora):
    """Merged and begun again at every quarter of the run."""

    def __init__(self, model: LlamaForCausalLM, run: Run, settings: Settings, steps: int):
        super().__init__(model, run, settings, steps)
        self.every, self.factor = _cycles(steps, settings)
        self.relora = ReLora(self.model, self.optimizer, pruning=PruneByMagnitude(0.9), seed=run.seed)

    def before(self, step: int) -> None:
        if step and step % self.every == 0:
            self.relora.merge_and_restart()


class _WarmRelora(_FullSize):
    """AdamW on every weight in the first quarter, ReLoRA from there."""

    def __init__(self, model: LlamaForCausalLM, run: Run, settings: Settings, steps: int):
        super().__init__(model, run._replace(rate=run.warm_rate), settings, steps)
        self.every, self.factor = _cycles(steps, settings)
        self.begin = partial(_Relora, model, run, settings, steps)
        self.relora: _Relora | None = None

    def before(self, step: int) -> None:
        if step == self.every:
            self.relora = self.begin()
            self.model, self.optimizer = self.relora.model, self.relora.optimizer
        elif self.relora is not None:
            self.relora.before(step)


_METHODS: dict[str, Callable[[LlamaForCausalLM, Run, Settings, int], _FullSize]] = {
    "adamw": _FullSize,
    "galore": _Galore,
    "adarankgrad": _AdaRankGrad,
    "lora": _Lora,
    "relora": _Relora,
    "relora_warm": _WarmRelora,
}


def _groups(model: LlamaForCausalLM, run: Run) -> Groups:
    """The hidden matrices, the other ones, and the norms."""
    groups = model_param_groups(model, rank=run.rank)
    rates = [run.rate] + [run.other_rate] * (len(groups) - 1)
    return [{**group, "highest_lr": rate} for group, rate in zip(groups, rates, strict=True)]


def _cosine(steps: int) -> Callable[[int], float]:
    return partial(cosine_factor, total_steps=steps, warmup_steps=steps // 10, least=0.1)


def _cycles(steps: int, settings: Settings) -> tuple[int, Callable[[int], float]]:
    """Steps between two restarts, and the schedule that warms up again after each."""
    every = -(-steps // settings["cycles"])
    return every, jagged(_cosine(steps), restart_every=every, rewarmup_steps=every // 10)


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
