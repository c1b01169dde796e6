"""lm-eval's YAML task with its few-shot documents read when a prompt first needs them, and documents processed once.

Stock `ConfigurableTask` lists its whole training split when it is built, also for a 0-shot evaluation: seconds for a
large split, and an error where the local files do not have it. Prompts are the same.
"""

# pyright: basic
from __future__ import annotations

import functools
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api import samplers
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry

from gpu_pool.errors import PoolError
from gpu_pool.evaluator.typed_content import PLACEHOLDERS
from gpu_pool.records import Modality

KEPT_PROCESSED = 128
"""Processed splits that are kept; lm-eval asks for them several times a job."""


class NoFewshotDocuments(PoolError):
    """A task has no documents to take few-shot examples from."""


class LazyTask(ConfigurableTask):
    """A task made from YAML."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._is_built = False
        self._fewshot_seed: int | None = None
        self._shots: list[Any] = []
        """Few-shot documents of the prompt that is being built."""
        self._without_images: set[int] = set()
        """Which of them, by their ids, show no images."""
        self.max_images: int | None = None
        """Images of a prompt at most: its own come first, then those of the last examples; None: any number. An example
        shows all of its images, or none."""
        config = dict(config)
        self._doc_to_video: Any = config.pop("doc_to_video", None)
        super().__init__(config=config)
        if self.shows_videos:
            self.MULTIMODAL = True
        self._is_built = True

    @property
    def shows_videos(self) -> bool:
        """Whether its YAML has `doc_to_video`, which lm-eval lacks: like `doc_to_image`, with videos."""
        return self._doc_to_video is not None

    def doc_to_video(self, doc: Any) -> Any:
        """The videos of a document."""
        return self.doc_to_image(doc, self._doc_to_video)

    def fewshot_docs(self) -> Any:
        """The documents that examples are drawn from; None while the task is built, which makes that skip them."""
        return super().fewshot_docs() if self._is_built else None

    @functools.cached_property
    def sampler(self) -> samplers.ContextSampler:
        """As `ConfigurableTask.__init__` makes it."""
        documents = self.fewshot_docs()
        if documents is None:
            raise NoFewshotDocuments(f"{self.config.task} has no documents to take few-shot examples from")
        kind = self.fewshot_cfg.sampler
        make = samplers.get_sampler(kind) if isinstance(kind, str) else kind
        sampler = make(list(documents), rnd=None).set_rnd(self._fewshot_seed)
        if self._media:
            sampler.sample = self._remembering(sampler.sample)
        return sampler

    def fewshot_context(self, doc: Any, *args: Any, **kwargs: Any) -> Any:
        """As in lm-eval."""
        self._shots = []
        self._without_images = set()
        self._document = doc
        return super().fewshot_context(doc, *args, **kwargs)

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
        """As in lm-eval, without the places of images where an example shows none."""
        text = super().doc_to_text(doc, doc_to_text)
        if id(doc) not in self._without_images or not isinstance(text, str):  # some give the number of a choice
            return text
        return text.replace(PLACEHOLDERS["image"], "")

    def construct_requests(self, doc: Any, ctx: Any, **kwargs: Any) -> Any:
        """As in lm-eval, with videos, and with the media of the few-shot examples before the document's own: lm-eval
        leaves them out, though the examples' text shows where they belong."""
        made = super().construct_requests(doc, ctx, **kwargs)
        if not self._media:
            return made
        instances = made if isinstance(made, list) else [made]
        given: dict[str, Any] = instances[0].arguments[2] if len(instances[0].arguments) > 2 else {}
        shown: dict[str, Any] = {}
        for key, kind, get in self._media:
            own = given[key] if key in given else get(doc)
            of_shots = [get(shot) for shot in self._shots if PLACEHOLDERS[kind] in self._text_of_shot(shot)]
            shown[key] = [*of_shots, own] if of_shots else own
        for instance in instances:
            instance.arguments = (*instance.arguments[:2], shown)
        return made

    @property
    def _media(self) -> list[tuple[str, Modality, Callable[[Any], Any]]]:
        """(key of a request, kind, what gives it of a document) of all that documents show."""
        media: list[tuple[str, Modality, Callable[[Any], Any]]] = []
        if self.config.doc_to_image:
            media.append(("visual", "image", self.doc_to_image))
        if self.config.doc_to_audio:
            media.append(("audio", "audio", self.doc_to_audio))
        if self.shows_videos:
            media.append(("video", "video", self.doc_to_video))
        return media

    @property
    def media_folders(self) -> list[Path]:
        """Where relative paths of media may lie: beside the data files, or in the data folder."""
        options = self.config.dataset_kwargs or {}
        files = options.get("data_files") or ()
        groups = files.values() if isinstance(files, dict) else [files]
        names = [name for group in groups for name in ([group] if isinstance(group, str) else group)]
        folders = [Path(name).parent for name in names]
        return [*folders, *(Path(str(place)) for place in (options.get("data_dir"), self.DATASET_PATH) if place)]

    def _remembering(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(sample)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            self._shots = list(sample(*args, **kwargs))
            self._leave_out_images()
            return self._shots

        return remembered

    def _leave_out_images(self) -> None:
        """Of the first examples, as far as there are more than `max_images`."""
        if self.max_images is None:
            return
        room = self.max_images - str(self.doc_to_text(self._document)).count(PLACEHOLDERS["image"])
        for shot in reversed(self._shots):
            room -= self._text_of_shot(shot).count(PLACEHOLDERS["image"])
            if room < 0:
                self._without_images.add(id(shot))

    def _text_of_shot(self, shot: Any) -> str:
        return str(self.doc_to_text(shot, self.fewshot_cfg.doc_to_text))

    def set_fewshot_seed(self, seed: int | None = None) -> None:
        """As in lm-eval, without making the sampler."""
        self.fewshot_rnd = random.Random(seed)
        self._fewshot_seed = seed
        if "sampler" in self.__dict__:
            self.sampler.set_rnd(seed)


class LazyTaskFactory(TaskFactory):
    """Builds LazyTask where lm-eval's factory builds ConfigurableTask from a registered YAML."""

    def __init__(self) -> None:
        super().__init__()
        self._processed: OrderedDict[tuple[Any, str], Any] = OrderedDict()

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Any:
        config = self._load_full_config(entry, overrides)
        if "class" in config:
            return super()._build_task(entry, overrides)
        for key in ("tag", "group", "task_list"):
            config.pop(key, None)
        if callable(config.get("process_docs")):
            config["process_docs"] = self._once(config["process_docs"])
        return LazyTask(config)

    def _once(self, process: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`process`, applied once to each data set."""

        @functools.wraps(process)
        def processed(documents: Any) -> Any:
            if not isinstance(documents, datasets.Dataset):
                return process(documents)
            key = (process, documents._fingerprint)
            if key not in self._processed:
                self._processed[key] = process(documents)
                if len(self._processed) > KEPT_PROCESSED:
                    self._processed.popitem(last=False)
            self._processed.move_to_end(key)
            return self._processed[key]

        return processed
