//! What stands between the parentheses of `#[filter(...)]`.

use proc_macro2::{Ident, TokenStream};
use quote::quote;
use syn::{LitStr, Token, meta::ParseNestedMeta, punctuated::Punctuated};

/// The declared effects, by the names that authors write.
const EFFECTS: [(&str, &str); 4] = [
    ("changes_data", "CHANGES_DATA"),
    ("changes_offsets", "CHANGES_OFFSETS"),
    ("own_writes", "OWN_WRITES"),
    ("not_live", "NOT_LIVE"),
];

#[derive(Default)]
pub(crate) struct Arguments {
    pub(crate) name: Option<LitStr>,
    pub(crate) summary: Option<LitStr>,
    pub(crate) default: Option<LitStr>,
    pub(crate) children: Vec<LitStr>,
    pub(crate) children_optional: Vec<LitStr>,
    pub(crate) child_words: Vec<LitStr>,
    pub(crate) objects: Vec<LitStr>,
    pub(crate) effects: Vec<Ident>,
}

impl Arguments {
    pub(crate) fn take(&mut self, meta: ParseNestedMeta<'_>) -> syn::Result<()> {
        let text = |place: &mut Option<LitStr>| {
            if place.is_some() {
                return Err(meta.error("given twice"));
            }
            *place = Some(meta.value()?.parse()?);
            Ok(())
        };
        if meta.path.is_ident("name") {
            text(&mut self.name)?;
            check_name(self.name.as_ref())
        } else if meta.path.is_ident("summary") {
            text(&mut self.summary)
        } else if meta.path.is_ident("default") {
            text(&mut self.default)
        } else if meta.path.is_ident("children") {
            for child in list(&meta)? {
                self.take_child(child)?;
            }
            Ok(())
        } else if meta.path.is_ident("child_words") {
            for word in list(&meta)? {
                check_name(Some(&word))?;
                if self.is_child(&word.value()) {
                    return Err(syn::Error::new(word.span(), "it is the name of a child already"));
                }
                self.child_words.push(word);
            }
            Ok(())
        } else if meta.path.is_ident("objects") {
            for kind in list(&meta)? {
                check_name(Some(&kind))?;
                self.objects.push(kind);
            }
            Ok(())
        } else if meta.path.is_ident("effects") {
            meta.parse_nested_meta(|effect| {
                let name = effect.path.require_ident()?;
                if !EFFECTS.iter().any(|(known, _)| name == known) {
                    let known: Vec<_> = EFFECTS.iter().map(|(known, _)| *known).collect();
                    return Err(effect.error(format!("effects are {}", known.join(", "))));
                }
                self.effects.push(name.clone());
                Ok(())
            })
        } else {
            Err(meta.error(
                "expected name, default, summary, children(..), child_words(..), objects(..) or effects(..)",
            ))
        }
    }

    /// A child, which may be missing if its name ends with `?`.
    fn take_child(&mut self, child: LitStr) -> syn::Result<()> {
        let text = child.value();
        let (name, optional) = match text.strip_suffix('?') {
            Some(name) => (LitStr::new(name, child.span()), true),
            None => (child.clone(), false),
        };
        check_name(Some(&name))?;
        if self.is_child(&name.value()) {
            return Err(syn::Error::new(
                child.span(),
                "each child has a name of its own; `child` is always there",
            ));
        }
        if !optional && !self.children_optional.is_empty() {
            return Err(syn::Error::new(child.span(), "those that may be missing come behind the others"));
        }
        if optional { &mut self.children_optional } else { &mut self.children }.push(name);
        Ok(())
    }

    fn is_child(&self, name: &str) -> bool {
        let known = [&self.children, &self.children_optional, &self.child_words].into_iter().flatten();
        name == "child" || known.into_iter().any(|other| other.value() == name)
    }

    /// The bits of the declared effects.
    pub(crate) fn effect_bits(&self) -> TokenStream {
        let bits = self.effects.iter().map(|effect| {
            let (_, bit) = EFFECTS.iter().find(|(known, _)| effect == known).expect("checked in `take`");
            let bit = Ident::new(bit, effect.span());
            quote! { | ::driveline_sdk::export::effect::#bit }
        });
        quote! { 0 #(#bits)* }
    }

    /// The chosen default.
    pub(crate) fn default_bits(&self, at: &impl quote::ToTokens) -> syn::Result<TokenStream> {
        match self.default.as_ref().map(|text| (text.value(), text.span())) {
            Some((text, _)) if text == "pass" => Ok(quote! { ::driveline_sdk::export::default::PASS }),
            Some((text, _)) if text == "deny" => Ok(quote! { ::driveline_sdk::export::default::DENY }),
            Some((_, span)) => Err(syn::Error::new(span, "default is \"pass\" or \"deny\"")),
            None => Err(syn::Error::new_spanned(
                at,
                "#[filter] needs default = \"pass\" (operations left out go to the child as they are) or \
                 default = \"deny\" (they are emulated through those that are here, else refused)",
            )),
        }
    }
}

/// Texts between parentheses.
fn list(meta: &ParseNestedMeta<'_>) -> syn::Result<Punctuated<LitStr, Token![,]>> {
    let list;
    syn::parenthesized!(list in meta.input);
    Punctuated::parse_terminated(&list)
}

/// Names are what can stand in a configuration without quotes.
fn check_name(name: Option<&LitStr>) -> syn::Result<()> {
    let Some(name) = name else { return Ok(()) };
    let text = name.value();
    let valid = text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if valid && text.len() <= 64 {
        Ok(())
    } else {
        Err(syn::Error::new(
            name.span(),
            "a name is a lower-case letter, then letters, digits and `-`; 64 at most",
        ))
    }
}
