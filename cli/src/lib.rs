//! The command line: `forebay config`, `check`, `index`, `rewrite`, `plan`, `bench` and `verify`.
//!
//! [`run`] takes arguments, environment and outputs, so that the binary, the Python package and the tests share it. Results go to the output,
//! warnings and errors to the error output. It returns 0, 1 where the data is at fault, and 2 where the command or a setting is.

mod bench;
mod check;
mod config;
mod index;
mod plan;
mod progress;
mod report;
mod rewrite;
mod sequential;
mod token_column;
mod verify;

use std::ffi::OsString;
use std::io::Write;

use clap::error::{ContextKind, ContextValue};
use clap::{Args, Parser, Subcommand};
use forebay::settings::environment::Environment;
use forebay::settings::{Resolved, Scope};
use forebay::{Error, ErrorKind, settings};

/// Failure of the data.
const FAILED: u8 = 1;
/// Failure of the command: its usage, or a setting.
const MISUSED: u8 = 2;

/// Token loader for LLM training.
#[derive(Debug, Parser)]
#[command(name = "forebay", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prints every setting, its value and where that came from
    Config(config::Options),
    /// Opens and reads every shard: format, rows, tokens, block sizes, what is slow, what is broken
    Check(check::Options),
    /// Saves what opening the shards finds, so that later starts need not open them
    Index(index::Options),
    /// Writes a corpus anew so that it loads fast: format, type, sizes; resumable, and compared with the source
    Rewrite(rewrite::Options),
    /// Says what a run comes to and costs: steps, remainder, memory, shuffle distance, decoding, start
    Plan(plan::Options),
    /// Measures throughput without a trainer
    Bench(bench::Options),
    /// Proves that every token was delivered once: an epoch of a loader, or the delivery log of a run
    Verify(verify::Options),
    /// Prints the settings there are
    #[command(hide = true)]
    Settings {
        /// As the table of the README
        #[arg(long)]
        markdown: bool,
    },
}

/// Settings that have options of their own in every command that runs a loader.
#[derive(Debug, Default, Args)]
struct Shape {
    /// Tokens per sequence
    #[arg(long, value_name = "TOKENS")]
    seq_len: Option<String>,
    /// Sequences per rank and step
    #[arg(long, value_name = "N")]
    batch_size: Option<String>,
    /// Order: true, false, global or block
    #[arg(long, value_name = "ORDER", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    shuffle: Option<String>,
}

impl Shape {
    fn flags(&self) -> [(&'static str, Option<String>); 3] {
        [("seq_len", self.seq_len.clone()), ("batch_size", self.batch_size.clone()), ("shuffle", self.shuffle.clone())]
    }
}

/// Settings by name, which every command takes.
#[derive(Debug, Default, Args)]
struct Sets {
    /// A setting by its name; `forebay config` lists all
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = name_and_value)]
    sets: Vec<(String, String)>,
}

fn name_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) => Ok((name.trim().replace('-', "_"), value.to_owned())),
        None => Err("expected NAME=VALUE".to_owned()),
    }
}

impl Sets {
    /// The settings in force, where `flags` are arguments too. Warnings and notes go to `err`.
    fn resolve(
        &self,
        paths: &[String],
        flags: &[(&str, Option<String>)],
        context: &mut Context<'_>,
    ) -> Result<Resolved, Failure> {
        let mut explicit = self.sets.clone();
        for (name, value) in flags {
            explicit.extend(value.as_ref().map(|value| ((*name).to_owned(), value.clone())));
        }
        if !paths.is_empty() {
            explicit.push(("data".to_owned(), settings::list_text(paths)));
        }
        let resolved = settings::resolve(&explicit, context.env, Scope::All)?;
        for warning in &resolved.warnings {
            writeln!(context.err, "warning: {warning}")?;
        }
        for note in &resolved.notes {
            writeln!(context.err, "note: {note}")?;
        }
        if resolved.config.data.is_empty() && resolved.config.mixture.is_none() {
            return Err(Error::config("no data: name a file, folder or pattern, or set `FOREBAY_DATA`").into());
        }
        Ok(resolved)
    }
}

/// What a command works with.
struct Context<'a> {
    env: &'a Environment,
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
}

/// Why a command ends early.
#[derive(Debug)]
enum Failure {
    /// To be reported.
    Error(Error),
    /// The output cannot be written.
    Output(std::io::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Output(error)
    }
}

/// Runs the command that `args` name, of which the first is the program's name. Returns the exit status.
pub fn run(args: &[OsString], env: &Environment, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let text = error.render();
            // Where even that cannot be written there is nobody to tell.
            if error.use_stderr() {
                let _ = write!(err, "{text}");
                if let Some(name) = setting_meant(&error) {
                    let _ = writeln!(err, "\n  tip: `{name}` is a setting: `--set {name}=VALUE`");
                }
                return MISUSED;
            }
            let _ = write!(out, "{text}");
            return 0;
        }
    };
    let mut context = Context { env, out, err };
    let result = match &cli.command {
        Command::Config(options) => config::run(options, &mut context),
        Command::Check(options) => check::run(options, &mut context),
        Command::Index(options) => index::run(options, &mut context),
        Command::Rewrite(options) => rewrite::run(options, &mut context),
        Command::Plan(options) => plan::run(options, &mut context),
        Command::Bench(options) => bench::run(options, &mut context),
        Command::Verify(options) => verify::run(options, &mut context),
        Command::Settings { markdown } => print_settings(*markdown, &mut context),
    };
    match result {
        Ok(status) => status,
        // Whoever reads the output has seen enough, as `head` does.
        Err(Failure::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => 0,
        Err(Failure::Output(error)) => {
            let _ = writeln!(context.err, "error: cannot write the output: {error}");
            FAILED
        }
        Err(Failure::Error(error)) => {
            let _ = writeln!(context.err, "error: {}", error.report());
            if error.kind() == ErrorKind::Config { MISUSED } else { FAILED }
        }
    }
}

/// The setting that was given as an option and is none of the command's.
fn setting_meant(error: &clap::Error) -> Option<&'static str> {
    let ContextValue::String(option) = error.get(ContextKind::InvalidArg)? else { return None };
    let name = option.trim_start_matches('-').replace('-', "_");
    let is_unknown = error.kind() == clap::error::ErrorKind::UnknownArgument;
    settings::all().iter().map(|setting| setting.name).find(|known| is_unknown && *known == name)
}

fn print_settings(markdown: bool, context: &mut Context<'_>) -> Result<u8, Failure> {
    if markdown {
        write!(context.out, "{}", settings::markdown())?;
    } else {
        for setting in settings::all() {
            writeln!(context.out, "{}", setting.name)?;
        }
    }
    Ok(0)
}
