//! The attributes of `driveline-sdk`, which documents and re-exports them; nobody depends on this crate directly.
//!
//! [`macro@filter`] sees which operations an `impl Filter` block contains, so a filter's table of operations is
//! always what its author wrote: there is no flag to forget. [`macro@options`] is serde's derive with the rules
//! of options. Neither writes code that an author could not have written against `driveline_sdk::export`.
#![forbid(unsafe_code)]

mod arguments;
mod filter;

use proc_macro::TokenStream;
use quote::quote;
use syn::{Item, parse_macro_input};

/// Makes an `impl Filter for Type` block a filter that a library can export.
#[proc_macro_attribute]
pub fn filter(arguments: TokenStream, block: TokenStream) -> TokenStream {
    let mut parsed = arguments::Arguments::default();
    let parser = syn::meta::parser(|meta| parsed.take(meta));
    parse_macro_input!(arguments with parser);
    let block = parse_macro_input!(block as syn::ItemImpl);
    filter::expand(&parsed, &block)
        .unwrap_or_else(|error| {
            let error = error.to_compile_error();
            quote! { #block #error }
        })
        .into()
}

/// Makes a struct or enum readable from a node's options.
#[proc_macro_attribute]
pub fn options(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let arguments = proc_macro2::TokenStream::from(arguments);
    if !arguments.is_empty() {
        return syn::Error::new_spanned(arguments, "#[options] takes no arguments").to_compile_error().into();
    }
    let item = parse_macro_input!(item as Item);
    let rules = match &item {
        Item::Struct(_) => quote! { rename_all = "kebab-case", deny_unknown_fields },
        Item::Enum(_) => {
            quote! { rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields }
        }
        other => {
            let text = "options are a struct with named fields, or an enum inside one";
            return syn::Error::new_spanned(other, text).to_compile_error().into();
        }
    };
    quote! {
        #[derive(::driveline_sdk::serde::Deserialize)]
        #[serde(crate = "::driveline_sdk::serde", #rules)]
        #item
    }
    .into()
}
