//! Finds the command or option that a mistyped one most likely means.

use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use forebay::settings::{self, nearest_of};

use crate::Cli;

/// The hint for a mistake in the arguments, if a similar name exists.
pub(crate) fn hint(error: &clap::Error) -> Option<String> {
    let command = Cli::command();
    match error.kind() {
        ErrorKind::InvalidSubcommand => {
            let Some(ContextValue::String(word)) = error.get(ContextKind::InvalidSubcommand) else { return None };
            let names = command.get_subcommands().filter(|command| !command.is_hide_set()).map(clap::Command::get_name);
            nearest_of(word, names).map(|name| format!("did you mean `forebay {name}`?"))
        }
        ErrorKind::UnknownArgument => {
            let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg) else { return None };
            let name = option.trim_start_matches('-').split('=').next().unwrap_or_default().replace('-', "_");
            if let Some(setting) = settings::find(&name) {
                return Some(format!("`{name}` is a setting: `--set {}=VALUE`", setting.name));
            }
            let own = own_options(&command, error);
            if let Some(near) = nearest_of(&name, own.iter().map(|option| option.replace('-', "_"))) {
                return Some(format!("did you mean `--{}`?", near.replace('_', "-")));
            }
            settings::nearest(&name).map(|name| format!("did you mean the setting `--set {name}=VALUE`?"))
        }
        _ => None,
    }
}

/// The options of the command that was called, as the usage in the error names it.
fn own_options(command: &clap::Command, error: &clap::Error) -> Vec<String> {
    let usage = match error.get(ContextKind::Usage) {
        Some(ContextValue::StyledStr(usage)) => usage.to_string(),
        _ => String::new(),
    };
    let called =
        command.get_subcommands().find(|command| usage.split_whitespace().any(|word| word == command.get_name()));
    let options = called.into_iter().flat_map(|command| command.get_arguments());
    options.filter_map(|option| option.get_long().map(str::to_owned)).collect()
}
