"""The event loop: epoll, timers, what changes in directories. Handlers are called from here, and none is known here."""
