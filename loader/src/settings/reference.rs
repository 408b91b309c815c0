//! The reference of all settings, as `docs/settings.md` holds it.

use super::all;

/// The settings as a Markdown table.
pub fn markdown() -> String {
    let mut text =
        String::from("| setting | environment | kind | default | accepts | meaning |\n|---|---|---|---|---|---|\n");
    for setting in all() {
        let default = match setting.default_text() {
            none if none.is_empty() => String::new(),
            value => format!("`{value}`"),
        };
        text.push_str(&format!(
            "| `{}` | `{}` | {} | {default} | {} | {} |\n",
            setting.name,
            setting.variable(),
            setting.kind().name(),
            setting.accepts(),
            setting.doc()
        ));
    }
    text
}
