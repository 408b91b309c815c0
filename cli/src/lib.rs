//! The command line: `forebay config`, `check`, `index`, `rewrite`, `plan`, `serve`, `top`, `bench`
//! and `verify`.
//!
//! [`run`] takes arguments, environment and outputs, so that the binary, the Python package and the
//! tests share it. Results go to the output. Warnings, notes and errors go to the error output.
//!
//! The exit status is 0 for success, 1 for faulty data, 2 for a wrong command or setting, and 130
//! after Ctrl-C.

mod bench;
mod check;
mod config;
mod flat;
mod index;
mod interrupt;
mod lengths;
mod mistakes;
mod packed;
mod plan;
mod progress;
mod report;
mod rewrite;
mod sequential;
mod serve;
mod shard_reader;
mod supervised;
mod token_column;
mod top;
mod verify;
mod whole_rows;

use std::ffi::OsString;
use std::io::Write;

use clap::{Args, Parser, Subcommand};
use forebay::corpus::discover::{self, ShardFile};
use forebay::notices::{self, Level, Notice};
use forebay::settings::environment::Environment;
use forebay::settings::{DataFormat, Resolved, Scope};
use forebay::storage::Files;
use forebay::{Error, ErrorKind, settings};
pub use interrupt::end_at_interrupt;
pub use plan::plan_of;
use report::{escaped, escaped_faults};

/// Exit status if the data is faulty.
const FAILED: u8 = 1;
/// Exit status if the usage or a setting is wrong.
const MISUSED: u8 = 2;

/// Loads tokens for LLM training: looks at corpora, plans runs, measures, proves.
#[derive(Debug, Parser)]
#[command(
    name = "forebay",
    version,
    arg_required_else_help = true,
    after_help = "Example: forebay check corpus/\n\nEach command has examples of its own: forebay check --help"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prints every setting, its value, and where the value came from
    Config(config::Options),
    /// Opens and reads every shard, and names what is broken, slow or not read
    Check(check::Options),
    /// Saves what opening finds in every shard, so that later starts need not open them
    Index(index::Options),
    /// Writes the documents of a corpus into files that load fast, and compares both
    Rewrite(rewrite::Options),
    /// Computes the steps, memory, shuffle distance and decoding of a run before it starts
    Plan(plan::Options),
    /// Computes batches for consumers in other processes
    Serve(serve::Options),
    /// Shows the loaders of running processes
    Top(top::Options),
    /// Measures throughput without a trainer
    Bench(bench::Options),
    /// Proves that every token was delivered once, in an epoch or in the delivery log of a run
    Verify(verify::Options),
    /// Prints the names of all settings
    #[command(hide = true)]
    Settings {
        /// Prints the table of docs/settings.md
        #[arg(long)]
        markdown: bool,
    },
}

/// Settings that have their own options in every command that runs a loader.
#[derive(Debug, Default, Args)]
struct ShapeOptions {
    #[arg(long, value_name = "TOKENS", help = config::help_of("seq_len"))]
    seq_len: Option<String>,
    #[arg(long, value_name = "N", help = config::help_of("batch_size"))]
    batch_size: Option<String>,
    #[arg(
        long,
        value_name = "ORDER",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help = config::help_of("shuffle")
    )]
    shuffle: Option<String>,
}

impl ShapeOptions {
    fn flags(&self) -> [(&'static str, Option<String>); 3] {
        [("seq_len", self.seq_len.clone()), ("batch_size", self.batch_size.clone()), ("shuffle", self.shuffle.clone())]
    }
}

/// Settings by name, in every command.
#[derive(Debug, Default, Args)]
struct Sets {
    /// Sets any setting by its name; `forebay config` lists all
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
    /// Resolves the settings in force, with `flags` as further arguments. Prints warnings and
    /// notes.
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
        context.tell(&resolved)?;
        if resolved.config.data.is_empty() && resolved.config.mixture.is_none() {
            return Err(Error::config("no data: name a file, folder or pattern, or set `FOREBAY_DATA`").into());
        }
        Ok(resolved)
    }
}

/// The environment and the outputs of a command.
struct Context<'a> {
    env: &'a Environment,
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
    /// Notices below this level are not printed. `None` prints no notice.
    level: Option<Level>,
}

impl Context<'_> {
    /// Writes the warnings and notes of the settings.
    fn tell(&mut self, resolved: &Resolved) -> std::io::Result<()> {
        for warning in &resolved.warnings {
            self.warn(warning)?;
        }
        for note in &resolved.notes {
            writeln!(self.err, "note: {}", escaped(note))?;
        }
        Ok(())
    }

    /// Writes the notices that the loader left since the last call.
    fn tell_notices(&mut self) -> std::io::Result<()> {
        if !notices::are_waiting() {
            return Ok(());
        }
        for Notice { level, text } in notices::take() {
            if self.level.is_some_and(|least| level >= least) {
                let name = match level {
                    Level::Debug => "debug",
                    Level::Info => "info",
                    Level::Warning => "warning",
                };
                writeln!(self.err, "{name}: {}", escaped(&text))?;
            }
        }
        Ok(())
    }

    /// Finds the shards of `data` in `files`, and prints the warnings.
    fn find(&mut self, files: &Files, data: &[String], format: DataFormat) -> Result<Vec<ShardFile>, Failure> {
        let found = discover::find(files, data, format)?;
        for warning in &found.warnings {
            self.warn(warning)?;
        }
        Ok(found.shards)
    }

    fn warn(&mut self, warning: &str) -> std::io::Result<()> {
        writeln!(self.err, "warning: {}", escaped(warning))
    }
}

/// The reason why a command ends early.
#[derive(Debug)]
enum Failure {
    /// A fault to report.
    Error(Error),
    /// The output could not be written.
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

/// Runs the command that `args` name, after the program's name. Returns the exit status.
pub fn run(args: &[OsString], env: &Environment, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let text = error.render();
            // If this cannot be written either, there is no way to report it.
            if error.use_stderr() {
                let _ = write!(err, "{text}");
                if let Some(hint) = mistakes::hint(&error) {
                    let _ = writeln!(err, "\n  tip: {}", escaped(&hint));
                }
                return MISUSED;
            }
            let _ = write!(out, "{text}");
            return 0;
        }
    };
    let mut context = Context { env, out, err, level: Some(Level::Warning) };
    let result = log_level(env).map_err(Failure::from).and_then(|level| {
        context.level = level;
        let ended = run_command(&cli.command, &mut context);
        context.tell_notices()?;
        ended
    });
    match result {
        Ok(status) => status,
        // The reader of the output has closed it early, like `head`.
        Err(Failure::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => 0,
        Err(Failure::Output(error)) => {
            let _ = writeln!(context.err, "error: cannot write the output: {error}");
            FAILED
        }
        Err(Failure::Error(error)) => {
            let _ = writeln!(context.err, "error: {}", escaped_faults(&error.report()));
            if error.kind() == ErrorKind::Config { MISUSED } else { FAILED }
        }
    }
}

fn run_command(command: &Command, context: &mut Context<'_>) -> Result<u8, Failure> {
    match command {
        Command::Config(options) => config::run(options, context),
        Command::Check(options) => check::run(options, context),
        Command::Index(options) => index::run(options, context),
        Command::Rewrite(options) => rewrite::run(options, context),
        Command::Plan(options) => plan::run(options, context),
        Command::Serve(options) => serve::run(options, context),
        Command::Top(options) => top::run(options, context),
        Command::Bench(options) => bench::run(options, context),
        Command::Verify(options) => verify::run(options, context),
        Command::Settings { markdown } => print_settings(*markdown, context),
    }
}

/// The level that `FOREBAY_LOG` asks for. Warnings if it is not set, and `None` for `error`.
fn log_level(env: &Environment) -> Result<Option<Level>, Error> {
    let text = env.get("FOREBAY_LOG").unwrap_or_default().trim().to_lowercase();
    Ok(match &*text {
        "" | "warn" => Some(Level::Warning),
        "info" => Some(Level::Info),
        "debug" => Some(Level::Debug),
        "error" => None,
        _ => return Err(Error::config(format!("`FOREBAY_LOG` must be error, warn, info or debug, found `{text}`"))),
    })
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
