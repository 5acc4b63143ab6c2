"""`ditcli ui`: a page on this machine on which pictures are seen to form."""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from queue import Queue
from typing import Any, get_args

import numpy as np

from ditcli.config import SampleConfig, SamplerName, UiConfig
from ditcli.denoisers.opening import Decode, find_model, open_model
from ditcli.diffusion import samplers
from ditcli.diffusion.denoiser import Denoiser
from ditcli.diffusion.guidance import guide
from ditcli.diffusion.wrappers import Remembering
from ditcli.drawing import choose_sampler, generate
from ditcli.errors import DitcliError, SettingError
from ditcli.images import make_grid
from ditcli.progress import say
from ditcli.starts import Start

MOST_PICTURES = 32
FRAMES = 12  # of a picture on its way: each is decoded
SHOWN = 160  # pixels of a picture's side, at least half of them
MOST_BOXES = 40  # more classes than these are searched, not ticked


@dataclass(frozen=True)
class Model:
    """A model that is open for drawing; `name` leads to it on a command line, None to the newest run."""

    name: str | None
    denoiser: Denoiser
    decode: Decode

    @property
    def most_steps(self) -> int:
        return min(self.denoiser.diffusion.schedule.num_steps or 250, 250)


def serve(config: UiConfig, *, tell: Callable[[str], object]) -> None:
    """Open the model and serve the page until Ctrl-C; `tell` gets its address.

    Raises DitcliError where gradio is missing, SettingError for a port that is taken, and as `open_model` does.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise DitcliError("the page needs gradio, which is not installed: `pip install 'ditcli[ui]'`.") from error
    model = open_for_page(config)
    page = build(model)
    # Fonts of the system: those of gradio's own theme would be fetched from the network.
    theme = gradio.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.launch(
            server_name=config.host,
            server_port=config.port,
            theme=theme,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
        )
    except OSError as error:
        raise SettingError(f"port is {config.port}, which cannot be listened at ({error}): give another.") from error
    try:
        tell(address)
        say("Ctrl-C ends it.")
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def open_for_page(config: UiConfig) -> Model:
    """The model that the config names. Raises as `open_model` does."""
    shared = {f.name for f in fields(SampleConfig)} & {f.name for f in fields(UiConfig)}
    denoiser, decode, _ = open_model(
        find_model(config.model, config.backend), SampleConfig(**{name: getattr(config, name) for name in shared})
    )
    return Model(config.model, denoiser, decode)


def form(
    model: Model, labels: Sequence[int], *, num: int, cfg: float, steps: int, sampler: SamplerName, seed: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Grids (H, W, 3) with a row for each label, and the steps that were done: what is foreseen, at last the pictures.

    They are those of `ditcli sample` with the same settings. Raises SettingError for too many pictures.
    """
    names = model.denoiser.class_names
    if names and not labels:
        raise SettingError("no label is chosen: choose one.")
    rows = list(labels) if names else [0]
    if len(rows) * num > MOST_PICTURES:
        raise SettingError(f"{len(rows) * num} pictures were asked for, but a page shows {MOST_PICTURES} at most.")
    network = Remembering(guide(model.denoiser, cfg if names else 1.0))
    times = samplers.time_grid(model.denoiser.diffusion.schedule, steps, model.denoiser.diffusion.config.spacing)
    wanted = {round(step) for step in np.linspace(1, steps, FRAMES + 1)} - {steps}
    told: Queue[tuple[int, np.ndarray | Exception]] = Queue()
    unwatched = threading.Event()
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += 1
        if unwatched.is_set():
            raise _Unwatched
        if done in wanted:
            told.put((done, network.estimates[-1]))
        network.estimates.clear()

    def draw() -> None:
        try:
            drawn = generate(
                network,
                model.decode,
                choose_sampler(sampler),
                times,
                labels=[label for label in rows for _ in range(num)],
                starts=[Start(seed + k) for _ in rows for k in range(num)],
                batch_size=MOST_PICTURES,
                advance=advance,
            )
            told.put((steps, np.stack([drawing.image for drawing in drawn])))
        except _Unwatched:
            pass
        except Exception as error:  # raised again where it is waited for
            told.put((-1, error))

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        while True:
            step, seen = told.get()
            if isinstance(seen, Exception):
                raise seen
            is_last = seen.dtype == np.uint8
            images = enlarge(seen if is_last else model.decode(seen))
            grid = [list(images[i : i + num]) for i in range(0, len(images), num)]
            yield make_grid(grid, [names[row] for row in rows if names]), step
            if is_last:
                return
    finally:
        unwatched.set()
        thread.join()


class _Unwatched(Exception):
    """The page was closed, or the button pressed again."""


def command_line(
    model: Model, labels: Sequence[int], *, num: int, cfg: float, steps: int, sampler: str, seed: int
) -> str:
    """What draws the same pictures in a terminal."""
    names = [model.denoiser.class_names[label] for label in labels]
    words = ["ditcli", "sample", *(["--model", model.name] if model.name else [])]
    words += ["--labels", *names] if names else []
    words += ["--num", f"{num}", "--cfg", f"{cfg:g}", "--steps", f"{steps}", "--sampler", sampler, "--seed", f"{seed}"]
    return shlex.join(words)


def enlarge(images: np.ndarray) -> np.ndarray:
    """Small images (N, H, W, 3) by a whole factor, without smoothing, so that they can be seen."""
    factor = max(1, SHOWN // max(images.shape[1:3]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def build(model: Model) -> Any:
    """The page."""
    import gradio as gr

    names = model.denoiser.class_names
    with gr.Blocks(title="ditcli", analytics_enabled=False) as page:
        gr.Markdown(f"# ditcli\nPictures from **{model.name or 'the newest run'}**")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                choices = [(name, i) for i, name in enumerate(names)]
                first = list(range(min(4, len(names))))
                if len(names) > MOST_BOXES:
                    labels = gr.Dropdown(choices, value=first, multiselect=True, label="Labels")
                else:
                    labels = gr.CheckboxGroup(choices, value=first, label="Labels", visible=bool(names))
                num = gr.Slider(1, 8, value=1, step=1, label="Pictures of each")
                cfg = gr.Slider(1, 10, value=3, step=0.1, label="Guidance", info="1 is none", visible=bool(names))
                steps = gr.Slider(1, model.most_steps, value=min(30, model.most_steps), step=1, label="Steps")
                sampler = gr.Dropdown(list(get_args(SamplerName)), value="ddim", label="Sampler")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                button = gr.Button("Draw", variant="primary")
            with gr.Column(scale=2, min_width=320):
                buttons = ["download", "fullscreen"]  # without `share`, which would upload
                picture = gr.Image(label="Pictures", format="png", interactive=False, height=480, buttons=buttons)
                state = gr.Textbox(label="State", value="Choose, then draw.", interactive=False)
                command = gr.Textbox(
                    label="The same in a terminal", interactive=False, buttons=["copy"], elem_id="command"
                )

        def draw(
            labels: list[int], num: int, cfg: float, steps: int, sampler: SamplerName, seed: int
        ) -> Iterator[tuple[Any, str, str]]:
            chosen: dict[str, Any] = {"num": num, "cfg": cfg, "steps": steps, "sampler": sampler, "seed": seed}
            same = command_line(model, labels or [], **chosen)
            try:
                for grid, step in form(model, labels or [], **chosen):
                    yield grid, "Done." if step == steps else f"Step {step} of {steps}", same
            except DitcliError as error:
                raise gr.Error(str(error), print_exception=False) from error

        inputs = [labels, num, cfg, steps, sampler, seed]
        button.click(draw, inputs, [picture, state, command], show_progress="minimal")
    return page
