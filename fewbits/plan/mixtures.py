"""llama.cpp's file types as data: each is a mixture of GGML types.

    RECIPES     name -> default type and number (`general.file_type`)
    ROWS        (role, recipes, conditions) -> type: exceptions from the default; the first match wins
    FALLBACK    type -> the substitute if a row length is no multiple of its block
    ROLES       tensor name -> role
    KEPT        names of the matrices that are never quantized

Source of the facts: llama.cpp, src/llama-quant.cpp. How they are applied: recipes.py.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache


@dataclass(frozen=True)
class Recipe:
    """One file type: its name in llama-quantize, its number (`general.file_type`), its default type."""

    name: str
    file_type: int
    default: str


def _lines(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines() if line]


# default type | recipe=number ...
_DEFAULTS = """
f32      f32=0
f16      f16=1
bf16     bf16=32
q4_0     q4_0=2
q4_1     q4_1=3
q5_0     q5_0=8
q5_1     q5_1=9
q8_0     q8_0=7
q2_k     q2_k=10 q2_k_s=21
q3_k     q3_k_s=11 q3_k_m=12 q3_k_l=13
q4_k     q4_k_s=14 q4_k_m=15
q5_k     q5_k_s=16 q5_k_m=17
q6_k     q6_k=18
iq1_s    iq1_s=24
iq1_m    iq1_m=31
iq2_xxs  iq2_xxs=19
iq2_xs   iq2_xs=20 iq2_s=28
iq2_s    iq2_m=29
iq3_xxs  iq3_xxs=23
iq3_s    iq3_xs=22 iq3_s=26 iq3_m=27
iq4_nl   iq4_nl=25
iq4_xs   iq4_xs=30
tq1_0    tq1_0=36
tq2_0    tq2_0=37
mxfp4    mxfp4_moe=38
"""
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}


RECIPES: dict[str, Recipe] = {}
for _default, *_named in _lines(_DEFAULTS):
    for _name, _, _number in (word.partition("=") for word in _named):
        RECIPES[_name] = Recipe(_name, int(_number), _default)
RECIPES.update({alias: RECIPES[name] for alias, name in _ALIASES.items()})

# Substitutes with blocks of 32, for rows that are no multiple of a type's block of 256 | for these
_STAND_INS = """
iq4_nl   iq1_s iq1_m iq2_xxs iq2_xs iq2_s iq3_xxs iq3_s iq4_xs
q4_0     q2_k q3_k tq1_0 tq2_0
q5_0     q4_k
q5_1     q5_k
q8_0     q6_k
"""
FALLBACK = {type_: stand_in for stand_in, *types in _lines(_STAND_INS) for type_ in types}

# Matrices that stay as stored, by a part of their name: small, or read by code that expects floats.
_KEPT = """
_norm.weight  ffn_gate_inp.weight  ffn_gate_tid2eid.weight  altup  laurel  per_layer_model_proj
ssm_conv1d  shortconv.conv.weight  indexer.k_proj.weight  indexer.q_proj.weight  attn_rel_b.weight
time_mix_first.weight  time_mix_w0.weight  time_mix_w1.weight  time_mix_w2.weight  time_mix_v0.weight
time_mix_v1.weight  time_mix_v2.weight  time_mix_a0.weight  time_mix_a1.weight  time_mix_a2.weight
time_mix_g1.weight  time_mix_g2.weight  time_mix_decay_w1.weight  time_mix_decay_w2.weight
time_mix_lerp_fused.weight  .position_embd  sam.pos_embd  sam.neck.  sam.net_  .rel_pos  .patch_embd
.patch_merger  a.rvq.codebook  mm.a.code_embd
"""
KEPT = tuple(_KEPT.split())
KEPT_NAMES = ("position_embd.weight", "token_types.weight")

# Role: the first whose pattern is found in the tensor's name. `v` is any tensor that holds attention values.
ROLES = (
    ("output", r"^output\.weight$"),
    ("embed", r"^(per_layer_)?token_embd\.weight$"),
    ("v", r"attn_(qkv|kv_b|v)\.weight"),
    ("k", r"attn_k\.weight"),
    ("q", r"attn_q\.weight"),
    ("o", r"attn_output\.weight"),
    ("up", "ffn_up"),
    ("gate", "ffn_gate"),
    ("down", "ffn_down"),
)

# role | recipes | conditions, all of which must hold (`!`: must not; `-`: none) | type
# gqa4: at least 4 query heads to a key head. first_8th: i < n // 8. more_bits: the first and last
# eighth, and every third between. ragged: the row length does not divide into the default's blocks.
_TABLE = """
output  mxfp4_moe                          -                     q8_0
output  *                                  falcon                q8_0
output  *                                  ragged                q8_0
output  iq1_* iq2_* iq3_xxs                -                     q5_k
output  q8_0                               -                     q8_0
output  *                                  -                     q6_k
*       mxfp4_moe                          experts               mxfp4
*       mxfp4_moe                          -                     q8_0
embed   iq2_xxs iq2_xs iq1_s iq1_m         -                     q2_k
embed   iq2_s iq2_m iq3_xxs                -                     iq3_s
embed   tq1_0 tq2_0                        -                     q4_k

v       iq1_* iq2_*                        gqa4                  q4_k
v       iq1_* iq2_*                        expert_count>=4       q4_k
v       iq2_s iq2_m                        -                     iq3_s
v       iq1_* iq2_*                        -                     q2_k
k       iq1_* iq2_*                        expert_count=8        q4_k
down    iq2_s iq2_m                        counted_first_8th     iq3_s
down    iq1_* iq2_*                        counted_first_8th     q2_k
o       iq1_* iq2_*                        expert_count=8        q5_k
o       iq1_s iq1_m                        -                     iq2_xxs
o       iq2_s iq2_m                        -                     iq3_s

v       *                                  expert_count=8        q8_0
v       q2_k q2_k_s                        gqa4                  q4_k
v       q2_k                               -                     q3_k
v       iq3_xxs iq3_xs iq3_s               gqa4                  q4_k
v       iq3_xxs                            !imatrix              iq3_s
v       iq3_m                              -                     q4_k
v       q3_k_m                             first_2               q5_k
v       q3_k_m                             -                     q4_k
v       q3_k_l                             -                     q5_k
v       iq4_nl iq4_xs                      gqa4                  q5_k
v       q4_k_m q5_k_m                      more_bits             q6_k
v       q4_k_s                             first_4               q5_k
k       *                                  expert_count=8        q8_0
k       iq3_xs                             -                     iq3_xxs
k       iq3_xxs                            -                     iq2_s
q       iq3_xs                             -                     iq3_xxs
q       iq3_xxs                            -                     iq2_s

down    q2_k                               -                     q3_k
down    q2_k_s                             first_8th             q4_k
down    iq3_xxs                            first_8th,!imatrix    q4_k
down    iq3_xxs                            !imatrix              q3_k
down    q3_k_m                             first_16th            q5_k
down    q3_k_m                             !falcon               q4_k
down    q3_k_m                             more_bits             q4_k
down    iq3_m                              first_8th             q4_k
down    iq3_m                              expert_count=8,more_bits  q4_k
down    q3_k_l                             falcon                q4_k
down    q3_k_l                             -                     q5_k
down    q4_k_m                             falcon,first_16th     q6_k
down    q4_k_m                             falcon,more_bits      q5_k
down    q4_k_m                             !falcon,more_bits     q6_k
down    iq4_nl iq4_xs                      first_8th,!imatrix    q5_k
down    q5_k_m                             more_bits             q6_k
down    q4_k_s                             !falcon,first_8th     q5_k
down    q4_0                               first_8th,imatrix     q4_1
down    q5_0                               first_8th,imatrix     q5_1

o       q3_k_l                             falcon                q4_k
o       *                                  falcon                default
o       q2_k q3_k_s q3_k_m q4_k_s q4_k_m   expert_count=8        q5_k
o       iq3_* iq4_*                        expert_count=8        q5_k
o       *                                  expert_count=8        default
o       q2_k                               -                     q3_k
o       iq3_xxs                            -                     iq3_s
o       q3_k_m iq3_m                       -                     q4_k
o       q3_k_l                             -                     q5_k
gate    iq3_xs                             middle                iq3_xxs
up      iq3_xs                             middle                iq3_xxs
"""


@dataclass(frozen=True)
class Row:
    role: str
    recipes: tuple[str, ...]
    conditions: tuple[str, ...]
    type: str

    def concerns(self, recipe: str, role: str) -> bool:
        return self.role in (role, "*") and any(fnmatchcase(recipe, pattern) for pattern in self.recipes)

    def holds(self, facts: set[str]) -> bool:
        return all((c[1:] not in facts) if c[0] == "!" else (c in facts) for c in self.conditions)


def _row(role: str, *words: str) -> Row:
    *recipes, conditions, type_ = words
    return Row(role, tuple(recipes), () if conditions == "-" else tuple(conditions.split(",")), type_)


ROWS = tuple(_row(*line) for line in _lines(_TABLE))


@cache
def rows_of(recipe: str, role: str) -> tuple[Row, ...]:
    return tuple(row for row in ROWS if row.concerns(recipe, role))


# Models that llama.cpp calls 70B: eight query heads share each value head, so that attn_v is small
# and one more bit there is nearly free. Architecture: number of blocks.
SHARED_VALUES = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
ONE_MORE_BIT = {"q3_k": "q5_k", "q4_k": "q5_k"}
# These have exceptions that no row describes.
NOT_DESCRIBED = ("glm5-next", "bailingmoe3")
# Too coarse to quantize without knowing which weights matter.
NEEDS_IMATRIX = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"})
