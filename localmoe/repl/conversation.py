"""What a chat holds: its model, loaded while a person types, its messages and its session.

It knows no terminal: repl.py and cli/chat.py show it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from ..chat.chat import Chat
from ..chat.kv_snapshot import file_key, restore_state, save_state
from ..errors import LocalMoeError
from ..prompt.messages import Message

if TYPE_CHECKING:
    from ..callbacks import LoadCallbacks
    from ..catalog.resolve import ResolvedModel
    from ..chat.session import Session, Sessions
    from ..config.settings import Settings
    from ..loading import EngineReloader, OpenModel
    from ..planner.measuring import MeasuringEngine


AT_LOADING = (
    "ctx_size", "vram", "ram", "n_gpu_layers", "n_cpu_moe", "kv_type", "threads", "ubatch_size",
    "load_mode",
)  # fmt: skip
"""Settings that count when a model is loaded."""


class Conversation:
    """A chat with a model that may still be loading. Close it.

    `sessions` None keeps nothing; `session` is the one that goes on, if any. `began_with` are the
    settings at first, `loaded_by` those by which the model was loaded. `measuring` is an engine
    that looked at this machine while the model was found.
    """

    def __init__(
        self,
        found: ResolvedModel,
        settings: Settings,
        callbacks: LoadCallbacks,
        measuring: MeasuringEngine | None = None,
    ) -> None:
        self.settings = self.began_with = self.loaded_by = settings
        self.sessions: Sessions | None = None
        self.session: Session | None = None
        self.on_note: Callable[[str], None] = lambda text: None
        self.was_killed = False  # by the person: then it isn't started again at once
        self.loading = BackgroundLoad(found, settings, callbacks, self._prepare, measuring)
        self._found = found
        self._loaded: OpenModel | None = None
        self._revival: EngineReloader | None = None
        self._chat: Chat | None = None

    def keep(self, sessions: Sessions | None, session: Session | None) -> None:
        """Keep what is said among `sessions`: in `session`, or in a new one."""
        self.sessions, self.session = sessions, session

    @property
    def model_name(self) -> str:
        """What the model was called by."""
        return self._found.called

    @property
    def lasting_name(self) -> str:
        """The same, for later: of a file its whole path, wherever one will be."""
        name = self._found.name
        return self.model_name if name.path is None or name.key else str(name.path.absolute())

    @property
    def pending(self) -> list[str]:
        """The settings that wait for the model to be loaded again."""
        now, then = self.settings, self.loaded_by
        return [name for name in AT_LOADING if getattr(now, name) != getattr(then, name)]

    @property
    def title(self) -> str:
        """What the model is called."""
        from ..loading import title  # start-up, 40 ms: not before the prompt

        return title(self._found.meta)

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        return self._chat is not None

    @property
    def loaded(self) -> OpenModel:
        """The model, waited for. Raises LocalMoeError where it failed to load."""
        self.ready()
        assert self._loaded is not None
        return self._loaded

    @property
    def chat(self) -> Chat:
        """The conversation itself, once the model is there. Raises LocalMoeError."""
        self.ready()
        assert self._chat is not None
        return self._chat

    @property
    def messages(self) -> Sequence[Message]:
        """What was said so far; needs no model."""
        if self._chat is not None:
            return self._chat.messages
        return self.session.messages if self.session else ()

    def load_now(self) -> None:
        """Load in the foreground, with its progress shown. Raises LocalMoeError."""
        self.loading.run()
        self.ready()

    def ready(self) -> None:
        """Wait for the model. Raises LocalMoeError where it can't be loaded."""
        if self._chat is None:
            self._attach(self.loading.result(), self.loaded_by)
            self._begin_with_session()

    def change(self, settings: Settings) -> None:
        """Go by other settings from now on; those of loading count at the next model."""
        from ..loading import format_of, think_of  # start-up, 40 ms: not before the prompt

        before, self.settings = self.settings, settings
        if self._chat is None:
            return
        self._chat.options = self.loaded.options(settings)
        self._chat.on_full = settings.on_full
        if before.think != settings.think:
            format = format_of(self.loaded.meta, think_of(settings))
            self.loaded.model = self._chat.model = replace(self._chat.model, format=format)

    def close(self) -> None:
        """End the engine; keep its state, so that the session goes on at once next time."""
        if self._chat is not None:
            with suppress(LocalMoeError):
                self._save_state()
            self.loaded.close()
        elif self.loading.has_loaded:
            self.loading.result().close()
        self.loading.close()
        self._chat = None
        self._let_go()

    def kill_engine(self) -> None:
        """End the engine now. It is started again when something is asked."""
        self.chat.revive = None
        self.was_killed = True
        self.loaded.engine.kill()

    def let_engine_return(self) -> None:
        """From now on an engine that died is started again, also where the person ended it."""
        self.was_killed = False
        if self._chat is not None:
            self._chat.revive = self._revival

    # ---- models ----

    def switch(self, found: ResolvedModel, callbacks: LoadCallbacks) -> None:
        """Go on with another model. Only the text of what was said counts: ids are a model's own.

        Raises LocalMoeError where it can't be loaded; then the one before is loaded again.
        """
        from ..loading import load_to_talk  # start-up, 40 ms: not before the prompt

        self.loaded.close()
        try:
            loaded = load_to_talk(found, self.settings, callbacks)
        except LocalMoeError:
            values = {name: getattr(self.loaded_by, name) for name in AT_LOADING}
            before = self.settings.model_copy(update=values)
            self._go_on_with(load_to_talk(self._found, before, callbacks), before)
            raise
        self._found = found
        self._go_on_with(loaded, self.settings)

    def reload(self, callbacks: LoadCallbacks) -> None:
        """Load the same model by the settings of now. Raises as `switch` does."""
        self.switch(self._found, callbacks)

    def _go_on_with(self, loaded: OpenModel, by: Settings) -> None:
        before = self.chat
        self._attach(loaded, by)
        self.chat.messages = [replace(message, tokens=None) for message in before.messages]
        self.chat.n_dropped = before.n_dropped

    def _attach(self, loaded: OpenModel, by: Settings) -> None:
        """Begin a conversation with a model that was loaded by these settings."""
        from ..loading import EngineReloader  # start-up, 40 ms: not before the prompt

        settings = self.settings
        self._loaded, self.loaded_by = loaded, by
        self._revival = EngineReloader(loaded, by, self.loading.callbacks)
        self._chat = Chat(
            loaded.model,
            loaded.options(settings),
            on_full=settings.on_full,
            on_note=lambda text: self.on_note(text),
            revive=self._revival,
        )
        self._chat.set_system(settings.system)

    # ---- sessions ----

    def save(self, question: str = "") -> None:
        """Have on disk what was said, and a question that is about to be asked.

        Raises LocalMoeError where it can't be kept.
        """
        if self.sessions is None or self._chat is None:
            return
        messages = [*self._chat.messages, *([Message("user", question)] if question else [])]
        if self.session is None:
            if not any(message.role == "user" for message in messages):
                return
            self.session = self.sessions.new(None, self.lasting_name)
        self._use_model(self.session, self.loaded)
        if self.session.sync(messages, self._chat.n_dropped):
            self.on_note(f"{self.session.path} was deleted meanwhile; it is written anew.")

    def begin_anew(self) -> None:
        """A new conversation; the one so far stays in its session."""
        self.chat.clear()
        if self.session is not None and (self.session.messages or self.session.unanswered):
            self._let_go()

    def rename(self, name: str) -> str:
        """Go on under this name. A session that a person named stays as it is beside it: then that
        name is given, else "".

        Raises UsageError where there is one of this name.
        """
        assert self.sessions is not None
        before = self.session
        if before is not None and not before.is_named:
            before.rename(name)
            return ""
        fresh = self.sessions.new(name, self.lasting_name)
        self._let_go()
        self.session = fresh
        is_there = before is not None and self.sessions.has(before.name)
        return before.name if before is not None and is_there else ""

    def open(self, session: Session) -> None:
        """Go on with another session."""
        self.chat.clear()
        self._let_go()
        self.session = session
        self._prepare(self.loaded)
        self._begin_with_session()

    def _prepare(self, loaded: OpenModel) -> None:
        """Let a model hold what a session's cache held. Runs where the model is loaded."""
        if self.session is not None:
            self._use_model(self.session, loaded)
            if self.session.messages:
                restore_state(self.session, loaded.engine)

    def _begin_with_session(self) -> None:
        """Go on where the session is."""
        session, chat = self.session, self.chat
        if session is None or not session.messages:
            return
        chat.messages, chat.n_dropped = list(session.messages), session.n_dropped
        if self.settings.system is not None:
            chat.set_system(self.settings.system)

    def _use_model(self, session: Session, loaded: OpenModel) -> None:
        session.use(self.lasting_name, file_key(loaded.meta.paths))

    def _save_state(self) -> None:
        if self.session is None or self.sessions is None or not self.session.messages:
            return
        chat, engine = self.chat, self.loaded.engine
        prompt = chat.model.format.encode(chat.prompted(), engine)
        save_state(self.sessions, self.session, engine, prompt.tokens)

    def _let_go(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None


WAKE_SECONDS = 0.2
"""A wait without an end can't be interrupted by Ctrl-C on Windows."""


class BackgroundLoad:
    """Loads a model that was found; `then` is done with it where it was loaded. What there is to
    say meanwhile is kept for `say`."""

    def __init__(
        self,
        found: ResolvedModel,
        settings: Settings,
        callbacks: LoadCallbacks,
        then: Callable[[OpenModel], None],
        measuring: MeasuringEngine | None = None,
    ) -> None:
        self.fraction = 0.0
        self._said: list[tuple[Callable[[str], None], str]] = []
        self._loaded: OpenModel | None = None
        self._error: BaseException | None = None
        self._on_error: Callable[[BaseException], None] | None = None
        self._callbacks = callbacks
        self.callbacks = self._quietly(callbacks)
        self._job = (found, settings)
        self._measuring = measuring
        self._then = then
        self._thread = threading.Thread(target=self._load, args=[self.callbacks], daemon=True)

    def start(self, on_error: Callable[[BaseException], None]) -> None:
        """Load in a thread, unless that was done; `on_error` is told there that it failed."""
        if not self.is_over:
            self._on_error = on_error
            self._thread.start()

    def run(self) -> None:
        """Load here and now, and say what there is to say."""
        self._load(self._callbacks)

    @property
    def is_over(self) -> bool:
        """Whether the model is loaded, or failed to be."""
        return self._loaded is not None or self._error is not None

    @property
    def has_loaded(self) -> bool:
        """Whether the model is loaded."""
        return self._loaded is not None

    @property
    def has_failed(self) -> bool:
        """Whether the model failed to load."""
        return self._error is not None

    def wait(self, seconds: float) -> bool:
        """Wait for the end of it; True where that has come."""
        if not self.is_over:
            self._thread.join(seconds)
        return self.is_over

    def result(self) -> OpenModel:
        """The model, when it is there. Raises LocalMoeError."""
        while not self.wait(WAKE_SECONDS):
            pass
        if self._error is not None:
            raise self._error
        assert self._loaded is not None
        return self._loaded

    def close(self) -> None:
        """Ends the engine that was handed over, where loading never began."""
        if self._measuring is not None:
            self._measuring.close()

    def say(self) -> None:
        """Say what was kept back."""
        said, self._said = self._said, []
        for say, text in said:
            say(text)

    def _load(self, callbacks: LoadCallbacks) -> None:
        try:
            from ..loading import load_to_talk  # start-up, 40 ms: not before the prompt

            measuring, self._measuring = self._measuring, None
            loaded = load_to_talk(*self._job, callbacks, measuring)
            self._then(loaded)
            self._loaded = loaded
        except BaseException as error:
            self._error = error
            if self._on_error:
                self._on_error(error)

    def _quietly(self, callbacks: LoadCallbacks) -> LoadCallbacks:
        def keep(say: Callable[[str], None] | None) -> Callable[[str], None] | None:
            return (lambda text: self._said.append((say, text))) if say else None

        def at(fraction: float) -> None:
            self.fraction = fraction

        return replace(
            callbacks,
            loading=at,
            log=None,
            note=keep(callbacks.note),
            warning=keep(callbacks.warning),
        )
