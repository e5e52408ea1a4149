"""Instruction encoders."""

import json

import pytest
import torch

from enerverse.model import HashedTextEncoder, PretrainedTextEncoder


@pytest.fixture(scope="module")
def encoder() -> HashedTextEncoder:
    torch.manual_seed(0)
    return HashedTextEncoder(16, 4096)


def test_equal_texts_have_equal_embeddings(encoder):
    first, second = encoder(["lift the red cube"] * 2)
    assert torch.equal(first, second)


def test_buckets_are_the_same_in_every_process(encoder):
    assert encoder.tokenize("Lift the cube!") == [3596, 3558, 440, 553, 3528]


def test_case_and_punctuation_do_not_matter(encoder):
    assert torch.equal(encoder(["Lift the Cube!"]), encoder(["lift the cube"]))


def test_the_order_of_words_matters(encoder):
    assert not torch.allclose(encoder(["red on blue"]), encoder(["blue on red"]))


def test_the_empty_text_has_an_embedding(encoder):
    assert encoder([""]).shape == (1, 16)
    assert encoder([""]).any()


def test_a_batch_equals_its_texts_one_by_one(encoder):
    texts = ["lift the cube", "", "push the block to the left of the cube"]
    torch.testing.assert_close(encoder(texts), torch.cat([encoder([text]) for text in texts]))


def test_saved_and_loaded_bit_for_bit(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    assert torch.equal(HashedTextEncoder.from_pretrained(tmp_path).table.weight, encoder.table.weight)


WORDS = ["<pad>", "</s>", "<unk>", "<|startoftext|>", "<|endoftext|>", "lift", "the", "cube", "push", "it"]


@pytest.fixture(params=["clip", "t5"])
def folder(request, tmp_path):
    """A tiny random CLIP or T5 text encoder with a word tokenizer, saved as its library saves it."""
    transformers = pytest.importorskip("transformers", reason="needs the `text` extra (transformers)")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=16,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(tmp_path)  # fmt: skip
    # Only the class name of a fast tokenizer is stored beside the model, which picks its own otherwise.
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    if request.param == "clip":
        config = transformers.CLIPTextConfig(
            vocab_size=10, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=3, eos_token_id=4, pad_token_id=0,
        )  # fmt: skip
        transformers.CLIPTextModel(config).save_pretrained(tmp_path)
    else:
        config = transformers.T5Config(
            vocab_size=10, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_pretrained_encoder_is_frozen_and_its_map_is_trained(folder):
    encoder = PretrainedTextEncoder(8, str(folder))
    assert [name for name, _ in encoder.named_parameters()] == ["project.weight", "project.bias"]
    encoder(["lift the cube"]).sum().backward()
    assert encoder.project.weight.grad.any()


def test_padding_does_not_change_a_pretrained_embedding(folder):
    encoder = PretrainedTextEncoder(8, str(folder)).eval()
    alone, padded = encoder(["lift it"])[0], encoder(["lift it", "push the cube the cube"])[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


def test_checkpoints_hold_no_frozen_weights(folder, tmp_path):
    encoder = PretrainedTextEncoder(8, str(folder)).eval()
    encoder.save_pretrained(tmp_path / "saved")
    loaded = PretrainedTextEncoder.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(loaded(["push the cube"]), encoder(["push the cube"]))
    assert (tmp_path / "saved" / "diffusion_pytorch_model.safetensors").stat().st_size < 2000


def test_another_kind_of_model_is_refused(tmp_path):
    pytest.importorskip("transformers", reason="needs the `text` extra (transformers)")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="expected a CLIP or T5 text encoder, got model type 'bert'"):
        PretrainedTextEncoder(8, str(tmp_path))
