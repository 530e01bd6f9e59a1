import pytest
import tiny
import transformers

from yunque.distributed.causal import check_packing
from yunque.errors import InputError

SIZES = {"vocab_size": tiny.VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LEAKY = {
    "Opt": transformers.OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16),
    "Bloom": transformers.BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, n_layer=1, n_head=2),
    "Falcon": transformers.FalconConfig(**SIZES),
    "Mamba": transformers.MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4),
    "Mpt": transformers.MptConfig(vocab_size=tiny.VOCABULARY, d_model=16, n_layers=1, n_heads=2),
}


@pytest.mark.parametrize("family", LEAKY)
def test_packing_is_refused_where_rows_would_see_each_other(family):
    model = transformers.AutoModelForCausalLM.from_config(LEAKY[family])
    with pytest.raises(InputError, match=r"^packing: .* does not keep rows of one sequence apart"):
        check_packing(model)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_packing_is_accepted_where_rows_stay_apart(build):
    check_packing(build())
