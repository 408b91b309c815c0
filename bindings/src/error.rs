//! Turns errors of the core into Python exceptions. Only this module chooses the class.

use std::panic::{AssertUnwindSafe, catch_unwind};

use forebay::{Error, ErrorKind};
use pyo3::marker::Ungil;
use pyo3::prelude::*;

/// The class of `forebay._errors` for a kind of failure.
fn class_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Config => "ConfigError",
        ErrorKind::NotFound => "NotFoundError",
        ErrorKind::Io => "ReadError",
        ErrorKind::Data | ErrorKind::Changed => "DataError",
        ErrorKind::State => "StateMismatchError",
        ErrorKind::Closed => "ClosedError",
        _ => "InternalError",
    }
}

/// Makes the exception for `error`, with its place as `path`, `block` and `row`, and its causes as
/// notes.
pub(crate) fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    build(py, error).unwrap_or_else(|failed| failed)
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let class = py.import("forebay._errors")?.getattr(class_name(error.kind()))?;
    let message = error.to_string();
    let exception = class.call1((&message,))?;
    if let Some(place) = error.location() {
        exception.setattr("path", place.path.to_string_lossy())?;
        exception.setattr("block", place.block)?;
        exception.setattr("row", place.row)?;
    }
    for cause in error.causes() {
        exception.call_method1("add_note", (format!("caused by: {cause}"),))?;
    }
    Ok(PyErr::from_value(exception))
}

/// Runs `work` without holding the interpreter. Its error or panic becomes an exception.
pub(crate) fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> forebay::Result<T> + Ungil + Send,
) -> PyResult<T> {
    let result = py.detach(|| {
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "no message".to_owned());
            Err(Error::new(ErrorKind::Internal, format!("forebay panicked: {text}; this is a defect of forebay")))
        })
    });
    result.map_err(|error| to_python(py, &error))
}
