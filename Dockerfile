FROM python:3.13-slim

# 0.0.0.0, because a container's own 127.0.0.1 is out of everybody's reach.
ENV HOST=0.0.0.0 PORT=5000
WORKDIR /app

# The packages before the source: they change less often, so their layer is kept.
COPY requirements.txt .
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.txt
COPY server.py dashboard.html ./
COPY tools tools
# chmod: the user below must read them, whatever umask the clone has. (COPY --chmod needs BuildKit.)
# import: a build that cannot start ends here, and Python's own modules get compiled for every start.
RUN chmod -R a+rX . && python -c "import server"

USER 10001:10001
EXPOSE 5000
# Unhealthy means: no 200, so also 503 while Redis is away. http.client, for urllib obeys http_proxy.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD python -c "import http.client as h; \
  c = h.HTTPConnection('127.0.0.1', $PORT); c.request('GET', '/health'); r = c.getresponse(); \
  print(r.read().decode()); exit(r.status != 200)"
CMD ["python", "server.py"]
