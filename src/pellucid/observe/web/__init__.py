"""The two pictures in the browser: what the page asks (feed, river), who answers (server), and the page itself (page/)."""
