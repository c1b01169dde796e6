"""Bodies of requests to the REST face. Field descriptions are what OpenAPI shows and what errors quote."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from gpu_pool.records import DEFAULT_SHARD_BYTES

MOST_DOCUMENTS = 2**53
"""The highest `limit`: beyond it floats are no exact numbers, and messages cannot hold them all."""

_SEED_MAX = 2**32 - 1
_BATCH_SIZE = r"^(auto|[1-9][0-9]{0,5})(?!\n)$"  # `$` alone lets a final newline through
_DEVICE = r"^(cpu|cuda(:(0|[1-9][0-9]{0,3}))?|(GPU|MIG)-[0-9A-Za-z/-]{1,80})(?!\n)$"
_TAG = r"^[A-Za-z0-9][A-Za-z0-9._:/=+-]{0,63}(?!\n)$"

Name = Annotated[str, Meta(min_length=1)]
Priority = Annotated[int, Meta(ge=-1000, le=1000, description="An integer from -1000 to 1000; larger goes first")]
Tags = Annotated[
    Annotated[list[Annotated[str, Meta(pattern=_TAG)]], Meta(max_length=32)] | None,
    Meta(
        description="At most 32 words to find the job by, of letters, digits and . _ : / = + -, without repetition",
        extra_json_schema={"uniqueItems": True},
    ),
]
Seed = Annotated[int, Meta(ge=0, le=_SEED_MAX)] | None


class Request(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of request bodies: unknown fields are refused."""


class EvaluateRequest(Request, frozen=True, kw_only=True):
    """What to evaluate and how. Everything but `model` and `tasks` has a default."""

    model: Annotated[
        Name, Meta(description='A model kind such as "hf" (with `pretrained` in `model_args`), a path or a hub id')
    ]
    tasks: Annotated[
        list[Name],
        Meta(
            min_length=1,
            description="A non-empty list of task, group or tag names without repetition; GET /tasks lists them",
            extra_json_schema={"uniqueItems": True},
        ),
    ]
    model_args: Annotated[
        dict[str, Any] | None,
        Meta(
            description="An object of model arguments: pretrained, dtype, revision, attn_implementation, peft…; "
            "of models that read images also min_pixels, max_pixels, image_max_side, max_images…"
        ),
    ] = None
    num_fewshot: Annotated[
        Annotated[int, Meta(ge=0, le=10_000)] | None,
        Meta(description="A number of few-shot examples, 0 or more; null: what the task says"),
    ] = None
    batch_size: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)] | Annotated[str, Meta(pattern=_BATCH_SIZE)] | None,
        Meta(description='Most sequences in one forward pass: a positive integer or "auto"; null: "auto"'),
    ] = None
    device: Annotated[
        Annotated[str, Meta(pattern=_DEVICE)] | None,
        Meta(
            description='"cpu", "cuda" (any GPU), "cuda:N" (GPU N in PCI order) or the UUID of a GPU or MIG instance '
            '("GPU-…", "MIG-…"); null: GPUs where there are any'
        ),
    ] = None
    limit: Annotated[
        Annotated[int, Meta(ge=1, le=MOST_DOCUMENTS)]
        | Annotated[float, Meta(gt=0, extra_json_schema={"exclusiveMaximum": 1})]
        | None,
        Meta(description="A number of documents of each task (1 or more) or a fraction of them (between 0 and 1)"),
    ] = None
    gen_kwargs: Annotated[
        str | dict[str, Any] | None,
        Meta(description='Generation options: "temperature=0,max_gen_toks=64" or an object'),
    ] = None
    log_samples: Annotated[bool, Meta(description="true or false: keep a record of every sample")] = True
    predict_only: Annotated[bool, Meta(description="true or false: predictions without metrics")] = False
    num_gpus: Annotated[
        int,
        Meta(ge=0, le=1_000_000, description="Most GPUs to use, 0 or more; 0: CPU. Without GPUs it counts CPU workers"),
    ] = 1
    merge: Annotated[
        Literal["regular", "ema"] | None,
        Meta(
            description='"regular" or "ema": the model is a sharded training checkpoint, of which these weights are '
            "merged first, into a folder in it; null: it is not sharded"
        ),
    ] = None
    output_dir: Annotated[
        Name | None, Meta(description="A folder for result files, under a root that the operator allows")
    ] = None
    use_cache: Annotated[
        bool, Meta(description="true or false: answer requests that this model has answered before from the cache")
    ] = True
    deterministic: Annotated[
        bool, Meta(description="true or false: bits of answers that do not depend on batches, workers or cache; slower")
    ] = False
    apply_chat_template: Annotated[
        bool | Name | None,
        Meta(
            description="true, false, or the name of one of the tokenizer's chat templates; null: lmms-eval's "
            "tasks that generate take the model's, all others none"
        ),
    ] = None
    system_instruction: Annotated[str | None, Meta(description="A text put before every prompt")] = None
    fewshot_as_multiturn: Annotated[
        bool, Meta(description="true or false: few-shot examples as turns of a conversation (with a chat template)")
    ] = True
    random_seed: Annotated[Seed, Meta(description="Seed of Python's random; null: not seeded")] = 0
    numpy_random_seed: Annotated[Seed, Meta(description="Seed of numpy; null: not seeded")] = 1234
    torch_random_seed: Annotated[Seed, Meta(description="Seed of torch; null: not seeded")] = 1234
    fewshot_random_seed: Annotated[Seed, Meta(description="Seed of the few-shot sampler; null: not seeded")] = 1234
    bootstrap_iters: Annotated[
        int, Meta(ge=0, le=10_000_000, description="Bootstrap rounds behind standard errors; 0: no standard errors")
    ] = 100_000
    priority: Priority = 0
    timeout_s: Annotated[
        Annotated[float, Meta(gt=0, le=31_536_000)] | None,
        Meta(
            description="Seconds that the job may run before it fails, in all its attempts together, waiting not "
            "counted (a restart of the server begins them anew); null: no limit"
        ),
    ] = None
    max_retries: Annotated[
        Annotated[int, Meta(ge=0, le=100)] | None,
        Meta(
            description="Further attempts after its processes were lost in any way, 0 or more (a restart of the server "
            "uses none up); null: as many as the operator allows, who leaves kills by others out of account"
        ),
    ] = None
    max_error_share: Annotated[
        float,
        Meta(ge=0, le=1, description="Share of its requests, from 0 to 1, that may end in an error before it fails"),
    ] = 0.0
    tags: Tags = None
    idempotency_key: Annotated[
        Annotated[str, Meta(min_length=1, max_length=255)] | None,
        Meta(description="A text of your choice: sent again with the same request it means the same job, not another"),
    ] = None


class PruneRequest(Request, frozen=True, kw_only=True):
    """Which cached answers to delete; with neither field only what is above the size limit."""

    older_than_days: Annotated[
        Annotated[int, Meta(ge=0, le=100_000)] | None,
        Meta(description="Only answers not used for so many days; 0: all"),
    ] = None
    model: Annotated[Name | None, Meta(description="Only this model's answers: its path or id, or fingerprint")] = None


class MergeRequest(Request, frozen=True, kw_only=True):
    """A sharded training checkpoint to turn into one that can be evaluated."""

    checkpoint_path: Annotated[
        Name, Meta(description="Folder of the sharded checkpoint, or one above several `checkpoint-N`: the latest")
    ]
    output_path: Annotated[
        Name | None, Meta(description="Folder to write to, under an allowed root; null: the checkpoint's own")
    ] = None
    checkpoint_type: Annotated[
        Literal["regular", "ema"],
        Meta(description='"regular" for the model\'s weights, "ema" for their average'),
    ] = "regular"
    max_shard_bytes: Annotated[
        int, Meta(ge=1, le=2**53, description="Most bytes of weights in one file, where no single tensor is larger")
    ] = DEFAULT_SHARD_BYTES
    priority: Priority = 0
    tags: Tags = None
