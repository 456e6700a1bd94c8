"""Random embedding models on disk: transformers' encoders, a WordPiece tokenizer, sentence-transformers' files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("the", "a", "boat", "river", "sails", "on", "old", "wherry", "carries", "corn", "and", "coal", "to", "town"),
    *(chr(c) for c in range(ord("a"), ord("z") + 1)),
    *(f"##{chr(c)}" for c in range(ord("a"), ord("z") + 1)),
    *("0", "1", "2", "##0", "##1", "##2", ".", ",", "!", "?"),
)
VOCAB_SIZE = 96
PAD = 0
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
}
DISTIL = {
    "vocab_size": VOCAB_SIZE,
    "dim": 32,
    "hidden_dim": 80,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Case:
    """An architecture. `family`: of transformers: what `…Config` and `…Model` begin with."""

    name: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)

    def build(self, directory: Path, **settings: Any) -> Any:
        """Saves the checkpoint and a tokenizer; the encoder alone comes back."""
        config = getattr(transformers, f"{self.family}Config")(**{**self.sizes, **self.settings, **settings})
        torch.manual_seed(11)
        model = getattr(transformers, self.model or f"{self.family}Model")(config).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or "norm" in name.lower():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(directory)
        save_tokenizer(directory)
        return getattr(model, model.base_model_prefix, model)


CASES = [
    Case("bert", "Bert"),
    Case("bert-masked-lm", "Bert", {"hidden_act": "relu"}, "BertForMaskedLM"),
    Case("roberta", "Roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
    Case("xlm-roberta", "XLMRoberta", {"pad_token_id": 1, "type_vocab_size": 1, "hidden_act": "gelu_new"}),
    Case("xlm-roberta-masked-lm", "XLMRoberta", {"pad_token_id": 1}, "XLMRobertaForMaskedLM"),
    Case("distilbert", "DistilBert", {"sinusoidal_pos_embds": True}, sizes=DISTIL),
]
BERT = CASES[0]


def save_tokenizer(directory: Path) -> None:
    """A WordPiece tokenizer, as BERT's are: lower case, [CLS] before and [SEP] after."""
    ids = {word: place for place, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizerFast"}))


def save_modules(
    directory: Path, pooling: dict[str, Any] | None = None, *, normalize: bool = True, **transformer: Any
) -> None:
    """The files of sentence-transformers. `pooling`: of its `config.json`; None: the mean."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalize
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    flags = {"word_embedding_dimension": 32, **({"pooling_mode_mean_tokens": True} if pooling is None else pooling)}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    if transformer:
        (directory / "sentence_bert_config.json").write_text(json.dumps(transformer))
