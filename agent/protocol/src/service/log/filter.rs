//! Which lines are logged: the value of `EBB_LOG`.

use tracing_subscriber::filter::{LevelFilter, Targets};

/// The prefix of the targets of ebb's own crates.
const OWN: &str = "ebb";

/// The most that other crates log unless they are named. hyper, h2, tower and kube write many lines for each call at
/// debug.
const OTHERS: LevelFilter = LevelFilter::INFO;

/// The filter for a list such as `debug` or `warn,h2=debug`. A level without a target is that of ebb's own crates, info
/// if there is none; other crates log at that level, but at most at [`OTHERS`]. The crates `muted` log nothing, unless
/// the list names them or asks for debug.
///
/// # Errors
///
/// What is wrong with the list.
pub(super) fn parse(list: &str, muted: &[&str]) -> Result<Targets, String> {
    let mut own = LevelFilter::INFO;
    let mut named = Vec::new();
    for item in list.split(',').map(str::trim).filter(|i| !i.is_empty()) {
        match item.split_once('=') {
            None => own = level(item)?,
            Some((target, text)) if is_target(target) => named.push((target, level(text)?)),
            Some((target, _)) => return Err(format!("{target:?} is not the name of a crate")),
        }
    }
    let is_named = |name: &str| named.iter().any(|(target, _)| target.starts_with(name));
    let muted = muted.iter().filter(|_| own < LevelFilter::DEBUG);
    let muted = muted.filter(|name| !is_named(name));
    Ok(Targets::new()
        .with_default(own.min(OTHERS))
        .with_target(OWN, own)
        .with_targets(muted.map(|name| (*name, LevelFilter::OFF)))
        .with_targets(named.iter().copied()))
}

fn level(text: &str) -> Result<LevelFilter, String> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "off" => LevelFilter::OFF,
        "error" => LevelFilter::ERROR,
        "warn" => LevelFilter::WARN,
        "info" => LevelFilter::INFO,
        "debug" => LevelFilter::DEBUG,
        "trace" => LevelFilter::TRACE,
        _ => return Err(format!("{text:?} is not a level")),
    })
}

fn is_target(text: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "_:".contains(c);
    !text.is_empty() && text.chars().all(is_allowed)
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    fn logs(list: &str, target: &str, level: Level) -> bool {
        let filter = parse(list, &["kube_client"]).unwrap();
        filter.would_enable(target, &level)
    }

    #[test]
    fn a_level_is_that_of_ebb_and_no_other_crate_logs_more_than_info() {
        for (list, most) in [
            ("", Level::INFO),
            ("debug", Level::DEBUG),
            ("TRACE", Level::TRACE),
        ] {
            assert!(logs(list, "ebb::server::holds", most), "{list}");
            assert!(logs(list, "ebb_cri_proxy::hold_client", most), "{list}");
            assert!(logs(list, "h2::proto", Level::INFO), "{list}");
            assert!(!logs(list, "h2::proto", Level::DEBUG), "{list}");
            assert!(!logs(list, "hyper_util::client", Level::DEBUG), "{list}");
        }
        assert!(!logs("info", "ebb::server", Level::DEBUG));
        assert!(logs("warn", "h2", Level::WARN) && !logs("warn", "h2", Level::INFO));
        assert!(!logs("off", "ebb", Level::ERROR) && !logs("off", "h2", Level::ERROR));
    }

    #[test]
    fn a_named_crate_has_the_level_that_the_list_gives_it() {
        let list = "warn, h2=trace ,ebb::server=debug";
        assert!(logs(list, "h2::proto", Level::TRACE) && !logs(list, "hyper", Level::INFO));
        assert!(logs(list, "ebb::server::api", Level::DEBUG));
        assert!(!logs(list, "ebb::drains", Level::INFO));
        assert!(logs("h2=debug", "ebb::drains", Level::INFO));
    }

    #[test]
    fn a_muted_crate_is_logged_only_if_it_is_named_or_debug_is_on() {
        let logs = |list| logs(list, "kube_client::client::builder", Level::ERROR);
        assert!(!logs("info") && !logs("warn") && !logs("info,ebb=debug"));
        assert!(logs("debug") && logs("trace"));
        assert!(logs("info,kube_client=error") && logs("info,kube_client::client=warn"));
    }

    #[test]
    fn what_is_no_level_is_named() {
        for (list, wrong) in [
            ("verbose", "\"verbose\" is not a level"),
            ("info,h2=5x", "\"5x\" is not a level"),
            ("ebb=", "\"\" is not a level"),
            ("[span]=info", "\"[span]\" is not the name of a crate"),
            ("=info", "\"\" is not the name of a crate"),
        ] {
            assert_eq!(parse(list, &[]).unwrap_err(), wrong);
        }
    }
}
