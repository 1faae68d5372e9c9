"""One self-contained HTML page about runs: `moma show RUN [RUN ...] --html page.html`."""
