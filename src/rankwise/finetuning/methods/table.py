"""Every method that can be named, in the order in which they are told of."""

from typing import Any

from torch import Tensor, nn

from rankwise.finetuning.methods import configs, lora_starts, optimizers
from rankwise.finetuning.methods.adalora import AdaLoraBudget, adalora_orthogonality
from rankwise.finetuning.methods.method import Method
from rankwise.finetuning.methods.relora import ReLoraRestarts

_STUDY = "it leaves no adapter; it is there to be compared with"
_CHANGES_WEIGHTS = "its restarts change the model's own weights, which an adapter does not hold: `docs/relora.md`"


def _tuner(model: Any) -> Any:
    """PEFT's model below its wrapper, and below that of data parallel training."""
    return getattr(model, "module", model).base_model


def _kasa_penalty(model: nn.Module) -> Tensor:
    return _tuner(model)._get_kasa_loss()


def _monteclora_penalty(model: nn.Module) -> Tensor:
    return _tuner(model)._get_monteclora_loss()


# Rates. Deep LoRA's, LoRA's and those of its nearest kin were measured (docs/few-labels.md); variants of LoRA without a remark
# take LoRA's, and starts with a first step as large as PiSSA's take PiSSA's. "PEFT 2e-4" is the rate of PEFT's comparison of
# methods on MetaMathQA (method_comparison/ in its repository), where LoRA has 1e-4: ours lies between that and ten times that,
# as LoRA's does. All were tried on one set (MiniLM, 128 sentences of CoLA, 60 steps; HRA and BOFT 12): the training loss, .170
# after the head's fit, fell to between .001 and .165.
METHODS: dict[str, Method] = {
    "deep-lora": Method(
        "Deep LoRA: U, r×r factors and V (after ICML 2024)",
        6e-4,
        configs.deep_lora,
        adam_eps=1e-6,
        convolutions=True,
        optimizer=optimizers.deep_lora,
    ),
    "lora": Method("LoRA, Kaiming start, scaling 1", 1e-3, configs.lora(), "LORA", convolutions=True),
    "lora-gaussian": Method(
        "LoRA from a normal A of variance 1/r²",
        1e-3,
        configs.lora(init_lora_weights="gaussian"),
        "init_lora_weights=gaussian",
        convolutions=True,
    ),
    "lora-plus": Method(
        "LoRA with B learning 16 times as fast as A",
        3e-4,
        configs.lora(),
        "create_loraplus_optimizer",
        convolutions=True,
        optimizer=optimizers.lora_plus,
    ),
    "lora-rite": Method(
        "LoRA with steps that do not depend on how B·A is split into B and A",
        3e-2,  # studies/lora-optimizers: 9e-2 was best on E2E, 3e-4 on STS-B, where this one costs .016
        configs.lora(),
        convolutions=True,
        optimizer=optimizers.lora_rite,
    ),
    "rslora": Method("LoRA scaled by √r", 3e-4, configs.lora(use_rslora=True), "use_rslora", convolutions=True),
    "dora": Method(
        "LoRA on the direction, a trained magnitude beside it",
        1e-3,
        configs.lora(use_dora=True),
        "use_dora",
        convolutions=True,
    ),
    "lora-riemannian": Method(
        "LoRA with r×r preconditioned gradients",
        3e-4,
        configs.lora(),
        "create_riemannian_optimizer",
        optimizer=optimizers.riemannian,
    ),
    "lora-fa": Method(
        "LoRA with A as drawn and B's gradient projected",
        1e-3,
        configs.lora(),
        "create_lorafa_optimizer",
        optimizer=optimizers.lora_fa,
    ),
    "lora-orthogonal": Method(
        "LoRA from orthogonal A and B that cancel",
        1e-3,
        configs.lora(init_lora_weights="orthogonal"),
        "init_lora_weights=orthogonal",
    ),
    "pissa": Method(
        "LoRA from the weight's top singular directions",
        3e-4,
        configs.lora_of_twice_the_rank,
        "init_lora_weights=pissa",
        # randomized: an exact SVD of every layer would be slow
        start=lora_starts.start_from_weights("pissa_niter_16"),
    ),
    "olora": Method(
        "LoRA from the weight's QR decomposition",
        3e-4,
        configs.lora_of_twice_the_rank,
        "init_lora_weights=olora",
        start=lora_starts.start_from_weights("olora"),
    ),
    "mica": Method(
        "LoRA whose B is the weight's least singular directions",
        1e-3,
        configs.mica,
        "init_lora_weights=mica",
    ),
    "eva": Method(
        "LoRA whose A is where the layer's inputs vary most",
        1e-3,
        configs.lora(),
        "init_lora_weights=eva",
        prepare=lora_starts.prepare_eva,
    ),
    "corda": Method(
        "LoRA from the weight's directions that the inputs use most",
        3e-4,
        configs.lora_of_twice_the_rank,
        "init_lora_weights=corda",
        start=lora_starts.hold_the_start,
        prepare=lora_starts.prepare_corda,
    ),
    "lora-ga": Method(
        "LoRA from the singular directions of the first gradient",
        3e-4,
        configs.lora_ga,
        "lora_ga_config",
        start=lora_starts.hold_the_start,
        prepare=lora_starts.prepare_loraga,
    ),
    "kasa": Method(
        "LoRA with singular values, without the weight's least directions",
        1e-3,
        configs.kasa,
        "kasa_config",
        penalty=_kasa_penalty,
    ),
    "velora": Method("LoRA that remembers its inputs compressed", 1e-3, configs.velora, "velora_config"),
    "monteclora": Method(
        "LoRA with learned noise on A while it trains",
        1e-3,
        configs.monteclora,
        "monteclora_config",
        start=lora_starts.draw_noise_when_asked,
        penalty=_monteclora_penalty,
    ),
    "adalora": Method(
        "LoRA with a moving rank budget",
        3e-3,
        configs.adalora,
        "ADALORA",
        convolutions=True,
        penalty=adalora_orthogonality,
        callback=AdaLoraBudget,
    ),
    "gralora": Method("LoRA in two by two blocks", 2e-3, configs.gralora, "GRALORA"),  # PEFT 2e-4
    "delora": Method("LoRA with the update's length trained apart", 3e-3, configs.delora, "DELORA"),  # PEFT's example
    "hira": Method(
        "the weight times a LoRA, entry by entry", 1e-2, configs.hira, "HIRA", convolutions=True
    ),  # PEFT 4.5e-3
    "glora": Method(
        "low-rank factors on the weight, beside it and on the bias", 1e-3, configs.glora, "GLORA"
    ),  # PEFT 1e-4, and 5e-4 for vectors
    "deft": Method("a subspace of the weight replaced by a trained one", 1e-3, configs.deft, "DEFT"),
    "adamss": Method(
        "rank-1 updates in clusters of the weight's subspace", 1e-2, configs.adamss, "ADAMSS"
    ),  # PEFT's example on images; 1e-4 in its comparison
    "loha": Method(
        "the product of two low-rank updates, entry by entry", 3e-3, configs.loha, "LOHA", convolutions=True
    ),
    "lokr": Method("a Kronecker product of small factors", 3e-3, configs.lokr, "LOKR", convolutions=True),  # PEFT 3e-3
    "miss": Method("one small matrix, repeated along the inputs", 1e-3, configs.miss, "MISS"),
    "peanut": Method("a small network of the weight's own columns", 1e-3, configs.peanut, "PEANUT"),
    "vera": Method("two trained vectors between shared random projections", 1e-2, configs.vera, "VERA"),
    "pvera": Method("VeRA with a trained distribution of its inner vector", 1e-2, configs.pvera, "PVERA"),  # PEFT 3e-3
    "randlora": Method("trained scalings of many random bases", 1e-3, configs.randlora, "RANDLORA"),
    "unilora": Method("all factors read from one trained vector", 1e-2, configs.unilora, "UNILORA"),  # PEFT 2e-3
    "vblora": Method(
        "factors mixed from one bank of vectors", 3e-3, configs.vblora, "VBLORA", optimizer=optimizers.vb_lora
    ),
    "tinylora": Method(
        "64 numbers a layer on two singular directions", 3e-3, configs.tinylora, "TINYLORA"
    ),  # PEFT 1e-3; 1e-2 was too much
    "osf": Method("the weight's least singular directions", 3e-4, configs.osf, "OSF"),  # PEFT 5e-5
    "psoft": Method("a rotation inside the weight's principal subspace", 1e-3, configs.psoft, "PSOFT"),
    "oft": Method("rotations of blocks of inputs", 1e-3, configs.oft, "OFT"),
    "boft": Method("rotations of blocks of inputs as butterflies", 1e-3, configs.boft, "BOFT"),
    "hra": Method("r reflections of the inputs", 1e-3, configs.hra, "HRA", convolutions=True),
    "road": Method("rotations and lengths of pairs of outputs", 3e-3, configs.road, "ROAD"),  # PEFT 1e-3
    "ia3": Method("a factor for every output", 5e-3, configs.ia3, "IA3", convolutions=True),  # PEFT 5e-3
    "frod": Method("a sparse rotation in a basis that layers share", 1e-3, configs.frod, "FROD"),  # PEFT 1e-3
    "fourierft": Method(
        "a few Fourier coefficients of the update", 3e-2, configs.fourierft, "FOURIERFT"
    ),  # a coefficient counts for 150/(m·n) of an entry
    "waveft": Method("a few wavelet coefficients of the update", 3e-4, configs.waveft, "WAVEFT"),  # PEFT 1e-4
    "c3a": Method("circulant blocks", 1e-1, configs.c3a, "C3A"),  # PEFT 3e-1
    "shira": Method("random entries of the weight", 1e-3, configs.shira, "SHIRA"),  # PEFT 3e-4
    "supertuning": Method("the largest entries of the weight", 1e-3, configs.supertuning, "SUPERTUNING"),  # PEFT 1e-4
    "relora": Method(
        "LoRA that is merged and started anew three times",
        3e-3,
        configs.lora(),
        why_not=_CHANGES_WEIGHTS,
        convolutions=True,
        callback=ReLoraRestarts,
    ),
    "full-width": Method(
        "Deep LoRA's factors before compression (ICML 2024, Table 1)", 1e-4, adam_eps=1e-6, why_not=_STUDY
    ),
    "full": Method("every weight", 3e-5, why_not=_STUDY, every_weight=True),
    "galore": Method(
        "every weight, with AdamW in a subspace of each matrix's gradient",
        1e-4,  # over AdamW's about as in reproduction/beyond/pretraining; AdaRankGrad's too
        why_not=_STUDY,
        optimizer=optimizers.galore,
        every_weight=True,
    ),
    "adarankgrad": Method(
        "every weight, in subspaces as small as the gradient allows",
        2e-4,
        why_not=_STUDY,
        optimizer=optimizers.adarankgrad,
        every_weight=True,
    ),
    "none": Method("the unadapted model; its head alone is trained, where it has one", 1e-3, why_not=_STUDY),
}
