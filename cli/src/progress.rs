//! Draws progress bars on a terminal, and nothing elsewhere.

use std::io::IsTerminal;

use forebay::Result;
use forebay::settings::environment::Environment;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Makes a bar of `length` on standard error. It draws nothing if that is not a terminal.
pub(crate) fn bar(length: u64, template: &'static str, env: &Environment) -> Result<ProgressBar> {
    let wanted = env.switch("FOREBAY_PROGRESS", true)? && env.get("NO_COLOR").is_none_or(str::is_empty);
    let target = if wanted && std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let style = ProgressStyle::with_template(template).expect("templates are constants that tests draw with");
    Ok(ProgressBar::with_draw_target(Some(length), target).with_style(style))
}
