// uPlot refuses to load where the browser's language is not a valid tag (a POSIX locale gives "en-US@posix").
try {
  new Intl.NumberFormat(navigator.language);
} catch {
  Object.defineProperty(navigator, "language", { value: "en-US", configurable: true });
}
