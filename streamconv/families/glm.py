"""GLM-4 (dense) and GLM-4.5, 4.6 (experts)."""

from __future__ import annotations

from streamconv.families import ops
from streamconv.families.blocks import (
    ATTENTION,
    DENSE,
    EXPERT_BIAS,
    EXPERTS,
    MLP,
    ROUTER,
    SHARED_EXPERTS,
    TOP,
    D,
    L,
    mtp,
)
from streamconv.families.rules import Family, rule

# The first rule that matches counts, so that what differs from a table stands before it.
_GLM4 = (
    rule(D + "mlp.linear_fc1.weight", L + "mlp.gate_up_proj.weight", ops.copy),
    *(
        rule(D + name, L + name, ops.copy)
        for name in ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")
    ),
    *DENSE,
)

_GLM4_MOE = (*ATTENTION, *MLP, *ROUTER, *EXPERT_BIAS, *EXPERTS, *SHARED_EXPERTS)

FAMILIES = (
    Family(name="glm4", model_types=("glm4",), rules=_GLM4),
    Family(
        name="glm4_moe",
        model_types=("glm4_moe",),
        rules=(*TOP, *_GLM4_MOE, *mtp(_GLM4_MOE)),
        extras=("model.layers.{mtp_layer}.{rest}",),
    ),
)
