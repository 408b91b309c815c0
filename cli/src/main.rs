//! The `forebay` command.

use std::process::ExitCode;

use forebay::settings::environment::Environment;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    let _interrupt = forebay_cli::end_at_interrupt();
    // Standard error is not locked, because the progress bar writes to it from other threads.
    let status = forebay_cli::run(&args, &Environment::current(), &mut std::io::stdout(), &mut std::io::stderr());
    ExitCode::from(status)
}
