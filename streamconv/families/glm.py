"""GLM-4 (dense), GLM-4.5 and 4.6 (experts), and others with their layers: dots.llm1, Hunyuan 3, Ling,
K-EXAONE, Sarvam.

DeepSeek's first model with experts has them, too: nothing in common with what followed it.
"""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import (
    ATTENTION,
    DENSE,
    EXPERT_BIAS,
    EXPERTS,
    MLA,
    MLP,
    ROUTER,
    SHARED_EXPERTS,
    TOP,
    D,
    L,
    mtp,
    mtp_beside,
    plain_mtp,
)
from streamconv.families.rules import Family, borrowing, moved, renamed, rule, without_class

# The first rule that matches counts, so that what differs from a table stands before it.
GLM4 = (
    rule(D + "mlp.linear_fc1.weight", L + "mlp.gate_up_proj.weight", ops.copy),
    *(
        rule(D + module + name, L + name, ops.copy)
        for home, name in (
            ("self_attention.", "post_self_attn_layernorm.weight"),
            ("mlp.", "post_mlp_layernorm.weight"),
        )
        for module in ("", home)  # ms-swift hangs them on the modules before them
    ),
    *DENSE,
)

GLM4_MOE = (*ATTENTION, *MLP, *ROUTER, *EXPERT_BIAS, *EXPERTS, *SHARED_EXPERTS)

# Hunyuan 3's names for a router and the shared experts.
_HY_V3 = renamed(
    GLM4_MOE,
    targets={
        "mlp.gate.weight": "mlp.router.gate.weight",
        "mlp.gate.e_score_correction_bias": "mlp.expert_bias",
        "mlp.shared_experts.": "mlp.shared_mlp.",
    },
)

_EXAONE_MOE = renamed(GLM4_MOE, targets={"mlp.gate.e_score": "mlp.e_score"})

# Ling and Ring 2, and Sarvam: queries, keys and values in one tensor, one after the other.
_BAILING_NAMES = {
    ".self_attn.": ".attention.",
    "attention.o_proj": "attention.dense",
    "attention.q_norm": "attention.query_layernorm",
    "attention.k_norm": "attention.key_layernorm",
    "gate.e_score_correction_bias": "gate.expert_bias",
}
_BAILING = (
    *(
        rule(
            f"{D}self_attention.linear_qkv.{kind}",
            f"{L}attention.query_key_value.{kind}",
            ops.joined_qkv,
        )
        for kind in ("weight", "bias")
    ),
    *renamed(GLM4_MOE, targets=_BAILING_NAMES),
)

# Ling 2.5: linear attention with a gate and a norm of its own, latent attention in every n-th layer.
_BAILING_HYBRID = (
    rule(D + "input_layernorm.weight", L + "input_layernorm.weight", ops.copy),
    *moved(D + "self_attention.", L + "attention.", {n: n for n in ("g_proj", "g_norm")}, ops.copy),
    *_BAILING,  # q_layernorm is the norm of queries here: latent attention has its norms fused
    *renamed(MLA, targets={".self_attn.": ".attention.", "attention.o_proj": "attention.dense"}),
)
_EMBEDDED = renamed(TOP, targets={"model.embed_tokens.": "model.word_embeddings."})

FAMILIES = (
    Family(name="glm4", model_types=("glm4",), rules=GLM4),
    Family(
        name="glm4_moe",
        model_types=("glm4_moe", "dots1"),
        rules=(*TOP, *GLM4_MOE, *mtp(GLM4_MOE)),
        extras=("model.layers.{mtp_layer}.{rest}",),
    ),
    Family(
        name="deepseek_v1",
        model_types=("deepseek",),
        rules=(*TOP, *GLM4_MOE),
        reference=borrowing({"deepseek": ("glm4_moe", "Glm4MoeForCausalLM")}),
        lacks=(L + "mlp.gate.e_score_correction_bias",),
    ),
    Family(
        name="hy_v3",
        model_types=("hy_v3",),
        rules=(
            *TOP,
            *_HY_V3,
            *plain_mtp(_HY_V3, "model.layers.{mtp_layer}.", "final_layernorm"),
        ),
        extras=("model.layers.{mtp_layer}.{rest}",),
    ),
    Family(
        name="exaone_moe",
        model_types=("exaone_moe",),
        rules=(*TOP, *_EXAONE_MOE, *mtp_beside(_EXAONE_MOE)),
        extras=("mtp.{rest}",),
    ),
    Family(
        name="bailing_moe",
        model_types=("bailing_moe", "bailing_moe_v2", "sarvam_moe"),
        rules=(
            *_EMBEDDED,
            *_BAILING,
            *plain_mtp(_BAILING, "model.layers.{mtp_layer}.", "final_layernorm"),
        ),
        extras=("model.layers.{mtp_layer}.{rest}",),
    ),
    Family(
        name="bailing_hybrid",
        model_types=("bailing_hybrid",),
        rules=(
            *_EMBEDDED,
            *_BAILING_HYBRID,
            *plain_mtp(_BAILING_HYBRID, "model.layers.{mtp_layer}.", "final_layernorm"),
        ),
        # Ling 3 has another linear attention, and transformers' class is of that.
        when=lambda config: "group_norm_size" in config,
        reference=without_class,
    ),
)
