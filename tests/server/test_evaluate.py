"""POST /evaluate: what is accepted, what it becomes, and every refusal names its field."""

from __future__ import annotations

from typing import Any

import pytest
from fake_pool import FakePool

from gpu_pool.records import Evaluation

MINIMAL: dict[str, Any] = {"model": "hf", "tasks": ["arc_easy"]}

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"model": ""}, "model"),
    ({"model": 1}, "model"),
    ({"model": None}, "model"),
    ({"model": "a\0b"}, "model"),
    ({"tasks": []}, "tasks"),
    ({"tasks": "arc_easy"}, "tasks"),
    ({"tasks": [""]}, "tasks[0]"),
    ({"tasks": ["piqa", 1]}, "tasks[1]"),
    ({"tasks": ["piqa", "piqa"]}, "tasks[1]"),
    ({"model_args": "pretrained=x"}, "model_args"),
    ({"model_args": {"max_length": 2**64}}, "model_args.max_length"),
    ({"model_args": {"x": [{"y": "\0"}]}}, "model_args.x[0].y"),
    ({"num_fewshot": -1}, "num_fewshot"),
    ({"num_fewshot": 1.0}, "num_fewshot"),
    ({"num_fewshot": "5"}, "num_fewshot"),
    ({"num_fewshot": True}, "num_fewshot"),
    ({"batch_size": 0}, "batch_size"),
    ({"batch_size": -1}, "batch_size"),
    ({"batch_size": 1.5}, "batch_size"),
    ({"batch_size": True}, "batch_size"),
    ({"batch_size": "junk"}, "batch_size"),
    ({"batch_size": "0"}, "batch_size"),
    ({"batch_size": "auto:4"}, "batch_size"),
    ({"batch_size": ""}, "batch_size"),
    ({"device": "gpu"}, "device"),
    ({"device": "cuda:-1"}, "device"),
    ({"device": "cuda:01"}, "device"),
    ({"device": "cpu\n"}, "device"),
    ({"device": 0}, "device"),
    ({"limit": 0}, "limit"),
    ({"limit": 0.0}, "limit"),
    ({"limit": -1}, "limit"),
    ({"limit": -0.5}, "limit"),
    ({"limit": 1.0}, "limit"),
    ({"limit": 1.5}, "limit"),
    ({"limit": True}, "limit"),
    ({"limit": "10"}, "limit"),
    ({"limit": 10**30}, "limit"),
    ({"limit": 1e30}, "limit"),
    ({"gen_kwargs": 1}, "gen_kwargs"),
    ({"gen_kwargs": "temperature"}, "gen_kwargs"),
    ({"gen_kwargs": "temprature=1"}, "gen_kwargs.temprature"),
    ({"gen_kwargs": f"top_k={10**30}"}, "gen_kwargs.top_k"),
    ({"log_samples": 1}, "log_samples"),
    ({"log_samples": None}, "log_samples"),
    ({"predict_only": "false"}, "predict_only"),
    ({"num_gpus": -1}, "num_gpus"),
    ({"apply_chat_template": ""}, "apply_chat_template"),
    ({"num_gpus": 1.5}, "num_gpus"),
    ({"num_gpus": None}, "num_gpus"),
    ({"output_dir": ""}, "output_dir"),
    ({"output_dir": 1}, "output_dir"),
    ({"use_cache": "yes"}, "use_cache"),
    ({"apply_chat_template": 1}, "apply_chat_template"),
    ({"system_instruction": ["x"]}, "system_instruction"),
    ({"random_seed": -1}, "random_seed"),
    ({"numpy_random_seed": 2**32}, "numpy_random_seed"),
    ({"torch_random_seed": 0.5}, "torch_random_seed"),
    ({"fewshot_random_seed": "1"}, "fewshot_random_seed"),
    ({"bootstrap_iters": -1}, "bootstrap_iters"),
    ({"limt": 3}, "limt"),
]


@pytest.mark.parametrize(("change", "field"), BAD_FIELDS)
async def test_refuses_and_names_the_field(api: Any, change: dict[str, Any], field: str):
    response = await api.post("/evaluate", json=MINIMAL | change)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert [error["field"] for error in problem["errors"]] == [field]
    assert problem["status"] == 422
    assert problem["detail"].startswith(f"{field}: ")
    assert (await api.get("/queue")).json()["queue_size"] == 0


@pytest.mark.parametrize("missing", ["model", "tasks"])
async def test_required_fields(api: Any, missing: str):
    response = await api.post("/evaluate", json={key: value for key, value in MINIMAL.items() if key != missing})
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == missing


async def test_an_unknown_field_gets_the_closest_names(api: Any):
    response = await api.post("/evaluate", json=MINIMAL | {"limt": 3})
    assert response.json()["errors"][0]["choices"][0] == "limit"


async def test_a_wrong_value_is_told_what_would_be_right(api: Any):
    response = await api.post("/evaluate", json=MINIMAL | {"batch_size": "junk"})
    assert 'a positive integer or "auto"' in response.json()["detail"]


async def test_refusals_of_the_pool_keep_field_and_choices(api: Any):
    response = await api.post("/evaluate", json=MINIMAL | {"tasks": ["piqa", "arc_esy"]})
    assert response.status_code == 422
    assert response.json()["errors"] == [{"field": "tasks[1]", "problem": "no such task", "choices": ["arc_easy"]}]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"limit": NaN}',
        b'{"model_args": {"a": ' + b"[" * 2000 + b"]" * 2000 + b"}}",
    ],
)
async def test_bodies_that_are_no_json(api: Any, body: bytes):
    response = await api.post("/evaluate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["detail"]


async def test_an_empty_body_is_told_what_to_send(api: Any):
    response = await api.post("/evaluate", content=b"", headers={"content-type": "application/json"})
    assert response.json()["detail"] == "The body is empty; send a JSON object"


@pytest.mark.parametrize("body", ["[]", "null", '"x"', "1"])
async def test_bodies_that_are_no_object(api: Any, body: str):
    response = await api.post("/evaluate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "body"


async def test_numbers_beyond_floating_point(api: Any):
    body = b'{"model": "hf", "tasks": ["piqa"], "limit": 1e999}'
    response = await api.post("/evaluate", content=body, headers={"content-type": "application/json"})
    assert response.json()["errors"][0]["field"] == "limit"


async def test_deep_nesting(api: Any):
    nested: Any = 1
    for _ in range(50):
        nested = [nested]
    response = await api.post("/evaluate", json=MINIMAL | {"model_args": {"x": nested}})
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"].startswith("model_args.x[0]")


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "application/msgpack", ""])
async def test_other_media_types(api: Any, media_type: str):
    headers = {"content-type": media_type} if media_type else {}
    response = await api.post("/evaluate", content=b'{"model": "hf", "tasks": ["piqa"]}', headers=headers)
    assert response.status_code == 415
    assert "application/json" in response.json()["detail"]


async def test_media_type_parameters_are_fine(api: Any):
    headers = {"content-type": "application/json; charset=utf-8"}
    response = await api.post("/evaluate", content=b'{"model": "hf", "tasks": ["piqa"]}', headers=headers)
    assert response.status_code == 200


async def test_large_bodies(api: Any):
    response = await api.post("/evaluate", json=MINIMAL | {"system_instruction": "x" * 10_001})
    assert response.status_code == 413
    assert "10000 bytes" in response.json()["detail"]


async def _evaluation(api: Any, pool: FakePool, **fields: Any) -> Evaluation:
    response = await api.post("/evaluate", json=MINIMAL | fields)
    assert response.status_code == 200, response.text
    return (await pool.job(response.json()["job_id"])).evaluation


@pytest.mark.parametrize(("sent", "meant"), [(10, 10), (10.0, 10), (0.25, 0.25), (1, 1), (None, None)])
async def test_limit(api: Any, fake_pool: FakePool, sent: Any, meant: Any):
    limit = (await _evaluation(api, fake_pool, limit=sent)).limit
    assert (limit, type(limit)) == (meant, type(meant))


@pytest.mark.parametrize(("sent", "meant"), [(8, 8), ("8", 8), ("auto", "auto"), (None, "auto")])
async def test_batch_size(api: Any, fake_pool: FakePool, sent: Any, meant: Any):
    assert (await _evaluation(api, fake_pool, batch_size=sent)).batch_size == meant


@pytest.mark.parametrize("sent", ["temperature=0,max_gen_toks=64", {"temperature": 0, "max_gen_toks": 64}])
async def test_gen_kwargs(api: Any, fake_pool: FakePool, sent: Any):
    assert (await _evaluation(api, fake_pool, gen_kwargs=sent)).gen_kwargs == {"temperature": 0, "max_gen_toks": 64}


async def test_every_field_reaches_the_pool(api: Any, fake_pool: FakePool):
    fields = {
        "model": "/models/x",
        "tasks": ["piqa", "mmlu"],
        "model_args": {"dtype": "float32"},
        "num_fewshot": 3,
        "batch_size": 7,
        "device": "cuda:1",
        "limit": 0.5,
        "gen_kwargs": {"temperature": 0.5},
        "log_samples": False,
        "predict_only": True,
        "num_gpus": 2,
        "merge": "ema",
        "output_dir": "/out",
        "deterministic": True,
        "use_cache": False,
        "apply_chat_template": "tool_use",
        "system_instruction": "Be brief.",
        "fewshot_as_multiturn": False,
        "random_seed": None,
        "numpy_random_seed": 1,
        "torch_random_seed": 2,
        "fewshot_random_seed": 3,
        "bootstrap_iters": 10,
        "priority": -3,
        "timeout_s": 60.5,
        "max_retries": 1,
        "max_error_share": 0.25,
        "tags": ["nightly", "run=7"],
        "idempotency_key": "step 100",
    }
    evaluation = await _evaluation(api, fake_pool, **fields)
    assert evaluation == Evaluation(**{**fields, "tasks": ("piqa", "mmlu"), "tags": ("nightly", "run=7")})
    assert set(fields) == set(Evaluation.__struct_fields__)


async def test_defaults_are_the_pools(api: Any, fake_pool: FakePool):
    assert await _evaluation(api, fake_pool) == Evaluation(model="hf", tasks=("arc_easy",))


async def test_explicit_nulls_are_what_the_reference_allows(api: Any, fake_pool: FakePool):
    nullable = ["model_args", "num_fewshot", "batch_size", "device", "limit", "gen_kwargs", "output_dir"]
    evaluation = await _evaluation(api, fake_pool, **dict.fromkeys(nullable))
    assert evaluation == Evaluation(model="hf", tasks=("arc_easy",))
