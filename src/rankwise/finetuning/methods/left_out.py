"""What PEFT has besides, and why it is no method here. A test holds this against PEFT's own registry."""

_PROMPT = "trains tokens or keys put before the input, not the weights"

LEFT_OUT: dict[str, str] = {
    # kinds of adapters (PeftType)
    "ADAPTION_PROMPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "BEFT": "trains biases, not the weights",
    "LN_TUNING": "trains normalizations, not the weights",
    "TRAINABLE_TOKENS": "trains the embeddings of some tokens",
    "LILY": "mixes the layers' factors by a router that sees the input: it cannot be merged",
    "SHADOW": "a second network beside a decoder: it cannot be merged",
    "POLY": "wants several tasks and the number of a row's task",
    "XLORA": "mixes adapters that are trained already",
    # starts and variants of LoRA (fields of LoraConfig)
    "init_lora_weights=loftq": "repairs what 4-bit quantization breaks; models are loaded in float32 here",
    "loftq_config": "see init_lora_weights=loftq",
    "eva_config": "see eva, with PEFT's ρ = 1",
    "corda_config": "see corda, instruction-previewed",
    "alora_invocation_tokens": "switched on by tokens in every input: it cannot be merged",
    "arrow_config": "mixes adapters that are trained already",
    "use_bdlora": "wants to know how a server shards each layer",
    "use_qalora": "for models quantized by GPTQ",
    "megatron_config": "how Megatron lays out a model, no method",
    "runtime_config": "where arithmetic is done, no method",
}
