//! The core's notices in Python's log.

use forebay::notices::{self, Level};
use pyo3::prelude::*;

/// Hands the waiting notices to `forebay._loader.tell`.
///
/// Consumers call this, because they hold the interpreter anyway.
#[inline]
pub(crate) fn tell(py: Python<'_>) -> PyResult<()> {
    if notices::are_waiting() { tell_all(py) } else { Ok(()) }
}

#[cold]
fn tell_all(py: Python<'_>) -> PyResult<()> {
    let tell = py.import("forebay._loader")?.getattr("tell")?;
    for notice in notices::take() {
        let level = match notice.level {
            Level::Debug => "debug",
            Level::Info => "info",
            Level::Warning => "warn",
        };
        tell.call1((level, notice.text))?;
    }
    Ok(())
}
