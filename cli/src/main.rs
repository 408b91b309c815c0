//! The `forebay` command.

use std::process::ExitCode;

use forebay::settings::environment::Environment;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    // Not locked: the progress bar writes to the same standard error, from other threads too.
    let status = forebay_cli::run(&args, &Environment::current(), &mut std::io::stdout(), &mut std::io::stderr());
    ExitCode::from(status)
}
