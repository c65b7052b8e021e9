// Swagger UI over this server's own description, with the key that the reader typed.

const KEY = "sortserve.key"; // the playground's name for it: one key opens both pages
const field = document.getElementById("key");
const message = document.getElementById("key-message");

function withKey(request) {
  const key = sessionStorage.getItem(KEY);
  if (key && !request.headers.Authorization) request.headers.Authorization = `Bearer ${key}`;
  return request;
}

async function show() {
  const { headers } = withKey({ headers: {} });
  const reply = await fetch("openapi.json", { headers });
  const body = await reply.json();
  if (!reply.ok) {
    message.textContent = body.error.message;
    field.focus();
    return;
  }
  message.textContent = headers.Authorization ? "Your key is sent with every request." : "";
  window.SwaggerUIBundle({
    spec: body,
    dom_id: "#swagger-ui",
    validatorUrl: null, // else Swagger asks a server of its own
    tryItOutEnabled: true,
    requestInterceptor: withKey,
  });
}

document.getElementById("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = field.value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  show();
});

field.value = sessionStorage.getItem(KEY) ?? "";
show();
